"""Tables and arrays that cannot be are refused by every stage that reads them."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import failure, write_params

from chest.dataset import (
    IMAGES,
    MANIFEST,
    MANIFEST_COLUMNS,
    SPLIT,
    read_dataset,
    read_images,
    read_labelled,
    read_manifest,
)
from chest.errors import InputError

TABLE = pd.DataFrame("x", index=range(3), columns=list(MANIFEST_COLUMNS)).assign(
    image_id=["a", "b", "c"], label=["covid19", "normal", "tuberculosis"], modality="ct"
)
SPLITS = ("train", "val", "test")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with three images, one of each split."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    TABLE.to_csv(MANIFEST, index=False)
    TABLE[["image_id"]].assign(split=SPLITS).to_csv(SPLIT, index=False)
    np.save(IMAGES, np.zeros((3, 224, 224), np.uint8))
    write_params(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_id": ["a", "a", "c"]}, "images doubled"),
        ({"image_id": ["b", "a", "c"]}, "not in order"),
        ({"label": ["covid19", "normal", "flu"]}, "the label 'flu'"),
        ({"modality": ["ct", "mri", "ct"]}, "the modality 'mri'"),
        ({"site": ["x", "a\nb", "x"]}, r"the site 'a\\nb'"),
        ({"site": ["x", "=HYPERLINK(1)", "x"]}, "the site '=HYPERLINK"),
        ({"patient_id": ["x", "@x", "x"]}, "the patient_id '@x'"),
        ({"study": ["x", "-1", "x"]}, "the study '-1'"),
        ({"path": ["x", "a\x1b[2J", "x"]}, "the path"),
        ({"collection": ["x", "y" * 501, "x"]}, "the collection"),
    ],
)
def test_a_poisoned_manifest_is_refused(place, changed, told):
    assert read_manifest().equals(TABLE)
    TABLE.assign(**changed).to_csv(MANIFEST, index=False)
    with pytest.raises(InputError, match=told):
        read_manifest()


@pytest.mark.parametrize("stage", ["split", "audit", "floors", "evaluate"])
def test_a_manifest_of_no_image_is_refused(place, capsys, stage):
    for path in (MANIFEST, SPLIT):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "no image\n" in failure(stage, capsys)


@pytest.mark.parametrize(
    ("stage", "lacking"),
    [
        *[
            (stage, split)
            for stage in ("floors", "evaluate", "finetune_siglip")
            for split in SPLITS
        ],
        *[(stage, "test") for stage in ("zeroshot_siglip", "zeroshot_qwen", "probe_shortcuts")],
    ],
)
def test_a_split_without_images_is_refused_by_whom_it_concerns(place, capsys, stage, lacking):
    other = "train" if lacking != "train" else "val"
    SPLIT.write_text(SPLIT.read_text().replace(f",{lacking}", f",{other}"))
    message = failure(stage, capsys)
    assert str(SPLIT) in message
    assert f"no image of {lacking}" in message


def test_the_split_says_what_it_lacks_only_where_it_is_needed(place):
    SPLIT.write_text(SPLIT.read_text().replace("val", "test"))
    assert len(read_labelled("train", "test")) == len(read_labelled()) == 3
    with pytest.raises(InputError, match="no image of val"):
        read_dataset(*SPLITS)


def test_a_manifest_that_lost_its_last_row_is_not_split(place, capsys):
    TABLE[:2].to_csv(MANIFEST, index=False)
    before = SPLIT.read_bytes()
    assert "uint8 of shape (2, side, side)" in failure("split", capsys)
    assert SPLIT.read_bytes() == before


# --- The array -------------------------------------------------------------------------------


def saved(array, save=np.save):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


def headed(header):
    """A .npy file of that header, as damage or malice leaves it."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(1000)


def shaped(shape, kind="|u1"):
    return headed(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}")


GOOD = np.zeros((3, 224, 224), np.uint8)
DAMAGED = {
    "empty": b"",
    "no array": b"images",
    "cut off": saved(GOOD)[:-1],
    "npz": saved(GOOD, np.savez),
    "brackets": headed("((((" * 40),
    "negative": shaped("(3, -224, 224)"),
    "without end": shaped(f"(3, {10**30}, 224)"),
    "large": shaped(f"(3, {2**31}, {2**31})"),
    "objects": shaped("(3, 4, 4)", "|O"),
    "deep": headed("(" * 5000 + ")" * 5000),
    "another side": saved(GOOD[:, :112, :112]),
    "no square": saved(GOOD[:, :, :100]),
    "no pixel": shaped("(3, 0, 0)"),
    "too few": saved(GOOD[1:]),
    "another type": saved(GOOD.astype(np.float32)),
    "flat": saved(GOOD.reshape(3, -1)),
    "one number": saved(np.uint8(3)),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_images_are_refused(place, how):
    assert read_dataset(side=224).images.shape == GOOD.shape
    IMAGES.write_bytes(DAMAGED[how])
    with pytest.raises(InputError, match=r"data/images\.npy") as error:
        read_images(3, 224)
    assert "expected: uint8 of shape (3, 224, 224)" in str(error.value)


@pytest.mark.parametrize("how", [how for how in DAMAGED if how != "another side"])
def test_so_they_are_where_no_side_is_asked_for(place, capsys, how):
    IMAGES.write_bytes(DAMAGED[how])
    assert "data/images.npy" in failure("audit", capsys)


@pytest.mark.parametrize(
    "stage", ["zeroshot_qwen", "zeroshot_siglip", "finetune_siglip", "probe_shortcuts"]
)
def test_images_of_another_side_are_refused_before_a_model_is_loaded(place, capsys, stage):
    IMAGES.write_bytes(DAMAGED["another side"])
    assert "uint8 of shape (3, 112, 112)" in failure(stage, capsys)


@pytest.mark.parametrize("path", [MANIFEST, SPLIT, IMAGES], ids=str)
def test_nobody_waits_for_the_other_end_of_a_pipe(place, path):
    path.unlink()
    os.mkfifo(path)
    signal.alarm(20)  # else the test would wait too
    try:
        with pytest.raises(InputError, match="no regular file"):
            read_dataset()
    finally:
        signal.alarm(0)
