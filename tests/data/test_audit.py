"""The leak audit: near-duplicates found as by brute force, and what the splits share."""

import io

import numpy as np
import pandas as pd
import pytest
from drawn import draw_picture
from PIL import Image

from chest.core.labels import SPLITS
from chest.data import audit
from chest.data.audit import (
    THRESHOLD,
    composition,
    find_near_duplicates,
    leak_counts,
    near_pairs,
    perceptual_hashes,
    worst_pairs,
)


def describe(splits, **columns):
    """Return a manifest with the column split, of images that are alike but for `columns`."""
    numbers = range(len(splits))
    table = pd.DataFrame({"image_id": [f"image-{i:05}" for i in numbers], "split": splits})
    table["pixel_hash"] = table["patient_id"] = table["image_id"]
    return table.assign(label="normal", collection="ct_slices", site="A").assign(**columns)


def resize(picture, side):
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def as_jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


COPIES = {
    "jpeg": as_jpeg,
    "resized": lambda picture: resize(resize(picture, 100), len(picture)),
    "brighter": lambda picture: np.minimum(picture * 1.05 + 5, 255).astype(np.uint8),
}


def drawn_hashes(families=40, size=8, flips=14):
    """Draw families of hashes: `size` of each differ from a common one in 0 to `flips` bits."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (families, 256)).repeat(size, axis=0).astype(np.uint8)
    for row in bits:
        row[rng.permutation(256)[: rng.integers(flips + 1)]] ^= 1
    return np.packbits(rng.permutation(bits), axis=1).view(np.uint64)


@pytest.mark.parametrize("chunk", [37, audit.CHUNK])
def test_pairs_are_those_of_a_plain_comparison(chunk, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", chunk)
    hashes = drawn_hashes()
    groups = np.random.default_rng(2).integers(0, 4, len(hashes))
    bits = np.unpackbits(hashes.view(np.uint8), axis=1).astype(np.int64)
    distance = (bits[:, None] != bits[None]).sum(2)
    first, second = np.nonzero((groups[:, None] < groups[None]) & (distance <= THRESHOLD))
    expected = sorted(zip(first, second, distance[first, second], strict=True))
    parts = near_pairs(hashes, groups, THRESHOLD)
    assert sorted(pair for part in parts for pair in zip(*part, strict=True)) == expected
    assert max(expected, key=lambda pair: pair[2])[2] == THRESHOLD


def test_opposite_hashes_are_not_near():
    hashes = np.array([[0] * 4, [2**64 - 1] * 4], np.uint64)
    assert [len(part[0]) for part in near_pairs(hashes, np.array([0, 1]), THRESHOLD)] == [0]


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_others_are_not(kind):
    pictures = [draw_picture(seed, 224) for seed in range(30)]
    pictures += [COPIES[kind](picture) for picture in pictures[:10]]
    labelled = describe(["train"] * 30 + ["test"] * 10)
    found = find_near_duplicates(labelled, perceptual_hashes(np.stack(pictures)))
    assert set(zip(found.pairs["image_id_a"], found.pairs["image_id_b"], strict=True)) == {
        (f"image-{i:05}", f"image-{i + 30:05}") for i in range(10)
    }
    assert found.counts["test_images"] == found.counts["train_test"] == 10


def test_counts_lists_and_order(monkeypatch):
    hashes = np.zeros((6, 4), np.uint64)
    hashes[5, 0] = 0b111
    splits = ["train", "train", "val", "test", "external", "test"]
    labelled = describe(splits, patient_id=list("aabbcd"), label=["normal"] * 5 + ["covid19"])
    found = find_near_duplicates(labelled, hashes)
    pairs = {"train_val": 2, "train_test": 4, "train_external": 2}
    pairs |= {"val_test": 2, "val_external": 1, "test_external": 2}
    pairs |= {"pairs": 13, "other_label": 4, "same_patient": 1}
    assert found.counts == pairs | {"test_images": 2, "external_images": 1}
    assert found.by_distance.to_dict("records") == [
        {"distance": 0, "same_patient": 1, "other_patient": 8},
        {"distance": 3, "same_patient": 0, "other_patient": 4},
    ]
    monkeypatch.setattr(audit, "LISTED", 5)
    few = find_near_duplicates(labelled, hashes)
    assert few.counts == found.counts
    pd.testing.assert_frame_equal(few.pairs, found.pairs.head(5))
    # Sorted by distance and image; each image once among the worst.
    assert list(found.pairs["distance"]) == [0] * 9 + [3] * 4
    assert worst_pairs(found.pairs, 9)[["image_id_a", "image_id_b"]].stack().is_unique


def test_leaks_and_composition():
    splits = ["train", "train", "val", "test", "test", "external"]
    labelled = describe(
        splits, patient_id=list("abbacd"), site=list("AABBAB"), pixel_hash=list("123455")
    )
    counts = dict.fromkeys([*audit.COUNTED, *audit.TWINS.values()], 0) | {"test_images": 1}
    leaks = leak_counts(labelled, counts)
    assert leaks["shared"] == {"patients": 2, "pixels": 1}
    assert leaks["test_share"] == {"patient_in_train": 0.5, "near_duplicate_in_train": 0.5}
    assert leaks["external_share"]["patient_in_train"] == 0
    table = composition(labelled)
    assert list(table["site"]) == ["A", "B", ""]
    total = table.iloc[-1]
    assert [total[f"{split}_images"] for split in SPLITS] == [2, 1, 2, 1]
    assert [total[f"{split}_patients"] for split in SPLITS] == [2, 1, 2, 1]
    assert table.loc[0, "train_images"] == 2
