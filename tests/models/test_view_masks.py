"""Which masks a view gets."""

import numpy as np
import pandas as pd
import pytest

from chest.data.masks import MASK_COLUMNS, MASK_INDEX, MASKS, pack, published_path
from chest.models.common.view_masks import another_patient, read_view_masks
from chest.models.common.views import View

SIDE = 16
TABLE = pd.DataFrame(
    {
        "image_id": list("abcdef"),
        "modality": ["ct", "ct", "xray", "xray", "xray", "xray"],
        "patient_id": ["p", "q", "r", "r", "s", "t"],
        "mask": ["", "", "c.png", "", "e.png", ""],
    }
)


def square(size):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:size, :size] = True
    return pack(mask)


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (MASKS, published_path(SIDE).parent):
        folder.mkdir(parents=True)
    np.save(MASKS / f"{SIDE}.npy", np.stack([square(n) for n in range(1, 7)]))
    np.save(published_path(SIDE), np.stack([square(10), square(11)]))
    index = pd.DataFrame(dict.fromkeys(MASK_COLUMNS, ""), index=range(6))
    index = index.assign(image_id=TABLE["image_id"], accepted=["True"] * 5 + ["False"])
    index.to_csv(MASK_INDEX, index=False)


def sizes(**view):
    masks, used = read_view_masks(TABLE, SIDE, View(visible="lungs", **view), seed=0)
    areas = np.unpackbits(masks, axis=-1).sum((1, 2))
    return np.sqrt(areas).tolist(), used.tolist()


def test_a_view_of_everything_needs_none():
    masks, used = read_view_masks(TABLE, SIDE, View(), seed=0)
    assert masks is None
    assert used.all()


def test_rejected_masks_become_the_whole_image_or_leave_the_image_out():
    assert sizes() == ([1, 2, 3, 4, 5, SIDE], [True] * 6)
    assert sizes(rejected="unanswered")[1] == [True] * 5 + [False]


def test_true_masks_are_the_published_ones_where_there_are_any():
    assert sizes(masks="true")[0] == [1, 2, 10, 4, 11, SIDE]


def test_shuffled_masks_are_those_of_another_patient_of_the_modality():
    chosen = another_patient(TABLE, seed=1)
    patients, modality = TABLE["patient_id"].to_numpy(), TABLE["modality"].to_numpy()
    assert (patients[chosen] != patients).all()
    assert (modality[chosen] == modality).all()
    assert sizes(masks="shuffled")[0] != sizes()[0]
