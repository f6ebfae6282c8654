"""The leak audit: what the splits hold, what they share, and which pictures are near-duplicates.

A near-duplicate is a pair of images whose perceptual hashes (pHash of the library imagehash, 256
bits) differ in at most THRESHOLD bits: the same picture saved again, at another size, brightness or
grey window, or the next slice of the same volume. A turned or mirrored copy is not found.

Why 24 of 256 bits: on 659 real chest CT slices, 400 X-rays and four CT volumes, copies saved as
JPEG, resized, brightened or windowed differed in at most 22 bits, slices up to 4 mm apart in at
most 24 (22 of 23 pairs), different people in at least 38 (369,000 pairs, but for one X-ray that is
there under two ids). Smaller hashes, and imagehash's by average, gradient or wavelet, told these
apart less well. Continued downwards, the distances between people leave some five pairs within 24
bits by chance among the 41 million pairs of CT slices of different people in two of the study's
splits.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from chest.errors import InputError, Problem
from chest.files import read_table
from chest.labels import SPLITS
from chest.progress import progress, workers
from chest.splitting import shared_between_splits

AUDIT = Path("data/audit")
NEAR_DUPLICATES = AUDIT / "near_duplicates.csv"
DESCRIBED = ("image_id", "split", "label", "patient_id", "collection")
NEAR_COLUMNS = ("distance", *(f"{column}_{side}" for side in "ab" for column in DESCRIBED))

HASH_SIDE = 16  # the hash is of the lowest 16 x 16 frequencies: 256 bits
THRESHOLD = 24
BATCH = 256  # images that a worker hashes at a time
CHUNK = 1 << 20  # pairs that are compared at a time: some 100 MB


# --- Near-duplicates -------------------------------------------------------------------------


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """The pHash of each image, uint64 (N, 4): 256 bits; `images` is uint8, (N, side, side)."""
    starts = range(0, len(images), BATCH)
    with ThreadPoolExecutor(workers()) as pool:
        parts = pool.map(lambda start: _hash(images[start : start + BATCH]), starts)
        return np.concatenate(list(progress(parts, f"x {BATCH} images", len(starts))))


def _hash(images: np.ndarray) -> np.ndarray:
    bits = [imagehash.phash(Image.fromarray(image), HASH_SIDE).hash.ravel() for image in images]
    return np.packbits(bits, axis=1).view(np.uint64)


def near_pairs(
    hashes: np.ndarray, groups: np.ndarray, threshold: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows of different `groups` whose hashes differ in at most `threshold` bits.

    `hashes` is uint64 (N, words), `groups` (N,). Returns the first and second rows of the pairs,
    int64, first < second, sorted, and in how many bits they differ.

    The bits are dealt to threshold // 2 + 1 bands. Two hashes that differ in two or more bits of
    every band differ in more than `threshold` in all: so only pairs that differ in at most one bit
    of some band are compared, and none is missed. Memory is bounded however many share a band.
    """
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    bands = threshold // 2 + 1
    found = np.empty(0, np.int64)
    for k in range(bands):
        # Every so many bits: each band has coarse structure, which chests share, and fine detail.
        band = bits[:, k::bands]
        keys = band @ (1 << np.arange(band.shape[1]))
        near = (
            _keep_near(hashes, groups, threshold, a, b) for a, b in _candidates(keys, band.shape[1])
        )
        found = np.unique(np.concatenate([found, *near]))
    first, second = np.divmod(found, len(hashes))
    return first, second, _distances(hashes, first, second)


def _keep_near(
    hashes: np.ndarray, groups: np.ndarray, threshold: int, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """Those of the pairs `a`, `b` that near_pairs looks for, each as first * N + second."""
    apart = groups[a] != groups[b]
    a, b = a[apart], b[apart]
    near = _distances(hashes, a, b) <= threshold
    a, b = a[near], b[near]
    return np.minimum(a, b) * len(hashes) + np.maximum(a, b)


def _candidates(keys: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each pair of rows whose `keys`, of `width` bits, differ in at most one bit, CHUNK at a time.

    For each bit that may differ (or none), the rows that fit a row stand side by side in the sorted
    keys; a pair is taken where the other row stands behind.
    """
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for flip in (0, *(1 << np.arange(width))):
        start = np.maximum(np.searchsorted(keys, keys ^ flip, "left"), np.arange(len(keys)) + 1)
        counts = np.maximum(np.searchsorted(keys, keys ^ flip, "right") - start, 0)
        ends = np.cumsum(counts)
        for low in range(0, int(counts.sum()), CHUNK):
            pair = np.arange(low, min(low + CHUNK, ends[-1]))
            row = np.searchsorted(ends, pair, "right")
            yield order[row], order[start[row] + pair - (ends - counts)[row]]


def _distances(hashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In how many bits rows `a` and `b` of `hashes` differ, pair by pair, int64."""
    return np.bitwise_count(hashes[a] ^ hashes[b]).sum(1, dtype=np.int64)


def find_near_duplicates(labelled: pd.DataFrame, hashes: np.ndarray) -> pd.DataFrame:
    """Every pair of near-duplicates in two splits: NEAR_COLUMNS, closest first, then by image_id.

    `labelled` is the manifest with the column split, row i of `hashes` that of its row i. The
    image of the split that comes first (train, val, test) is `a`.
    """
    rank = labelled["split"].map(SPLITS.index).to_numpy()
    first, second, distance = near_pairs(hashes, rank, THRESHOLD)
    swap = rank[first] > rank[second]
    a, b = np.where(swap, second, first), np.where(swap, first, second)
    sides = [
        labelled[list(DESCRIBED)].iloc[rows].reset_index(drop=True).add_suffix(f"_{side}")
        for side, rows in (("a", a), ("b", b))
    ]
    table = pd.concat([pd.Series(distance, name="distance"), *sides], axis=1)
    return table.sort_values(["distance", "image_id_a", "image_id_b"], ignore_index=True)


def read_near_duplicates() -> pd.DataFrame:
    """``data/audit/near_duplicates.csv``: strings, but for the distance, which is a number.

    Raises InputError where the file is missing, has other columns, or a distance is no number.
    """
    table = read_table(NEAR_DUPLICATES, NEAR_COLUMNS)
    try:
        return table.astype({"distance": np.int64})
    except ValueError as error:
        remedy = "run `dvc repro audit` to make it again"
        raise InputError([Problem(NEAR_DUPLICATES, str(error), "distances", remedy)]) from None


def count_by_distance(near_duplicates: pd.DataFrame) -> pd.DataFrame:
    """How many pairs there are at each distance: distance, same_patient, other_patient."""
    same = near_duplicates["patient_id_a"] == near_duplicates["patient_id_b"]
    counts = pd.DataFrame({"distance": near_duplicates["distance"], "same_patient": same})
    counts["other_patient"] = ~same
    return counts.groupby("distance", as_index=False).sum()


def worst_pairs(near_duplicates: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` closest pairs, each image in one of them only: one volume would fill the table."""
    chosen, seen = [], set()
    for row, pair in enumerate(near_duplicates[["image_id_a", "image_id_b"]].to_numpy()):
        if len(chosen) < n and seen.isdisjoint(pair):
            chosen.append(row)
            seen.update(pair)
    return near_duplicates.iloc[chosen].reset_index(drop=True)


# --- What the splits hold, and what they share -----------------------------------------------


def composition(labelled: pd.DataFrame) -> pd.DataFrame:
    """Images and patients of each label, collection and site in each split, and in all.

    `labelled` is the manifest with the column split. Columns label, collection, site, then
    train_images, train_patients, val_images and so on. The last row is the total, where a patient
    who is in several rows counts once.
    """
    total = labelled.assign(label="total", collection="", site="")
    return pd.concat([_count_by_site(labelled), _count_by_site(total)], ignore_index=True)


def _count_by_site(labelled: pd.DataFrame) -> pd.DataFrame:
    groups = labelled.groupby(["label", "collection", "site", "split"])
    counts = groups.agg(images=("image_id", "size"), patients=("patient_id", "nunique"))
    counts = counts.unstack("split", fill_value=0)
    columns = [(kind, split) for split in SPLITS for kind in ("images", "patients")]
    counts = counts.reindex(columns=columns, fill_value=0)
    counts.columns = [f"{split}_{kind}" for kind, split in columns]
    return counts.reset_index()


def leak_counts(labelled: pd.DataFrame, near_duplicates: pd.DataFrame) -> dict:
    """What the splits share, as a nested dict of numbers; shares from 0 to 1 of 4 places.

    `labelled` is the manifest with the column split. ``shared``: patients and pixel contents in
    more than one split. ``near_duplicates``: pairs across splits, in all, by pair of splits, of
    different labels, of one patient. ``test_share``: of the test images, how many have their
    patient, or a near-duplicate, in training.
    """
    split, patient = labelled["split"], labelled["patient_id"]
    test = labelled[split == "test"]
    pairs = near_duplicates["split_a"] + "_" + near_duplicates["split_b"]
    twins = near_duplicates.loc[pairs == "train_test", "image_id_b"]
    return {
        "shared": {
            "patients": len(shared_between_splits(labelled, split, "patient_id")),
            "pixels": len(shared_between_splits(labelled, split, "pixel_hash")),
        },
        "near_duplicates": {
            "pairs": len(near_duplicates),
            **{
                name: int((pairs == name).sum()) for name in ("train_test", "train_val", "val_test")
            },
            "other_label": int((near_duplicates["label_a"] != near_duplicates["label_b"]).sum()),
            "same_patient": int(
                (near_duplicates["patient_id_a"] == near_duplicates["patient_id_b"]).sum()
            ),
        },
        "test_share": {
            "patient_in_train": _share(test["patient_id"].isin(patient[split == "train"])),
            "near_duplicate_in_train": _share(test["image_id"].isin(twins)),
        },
    }


def _share(chosen: pd.Series) -> float:
    return round(float(chosen.mean()), 4) if len(chosen) else 0.0
