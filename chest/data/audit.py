"""The leak audit: what the splits hold, what they share, and which pictures are near-duplicates.

A near-duplicate is a pair of images whose perceptual hashes (pHash of the library imagehash, 256
bits) differ in at most THRESHOLD bits: the same picture saved again, at another size, brightness or
grey window, or the next slice of the same volume. A turned or mirrored copy is not found.

Why 24 of 256 bits: on 659 real chest CT slices, 400 X-rays and four CT volumes, copies saved as
JPEG, resized, brightened or windowed differed in at most 22 bits, slices up to 4 mm apart in at
most 24 (22 of 23 pairs), different people in at least 38 (369,000 pairs, except one X-ray that is
there under two ids). Smaller hashes, and imagehash's by average, gradient or wavelet, told these
apart less well.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table
from chest.core.labels import EVALUATED, SPLITS
from chest.core.parallel import parallel_map, progress
from chest.data.splits import shared_between_splits

AUDIT = Path("data/audit")
NEAR_DUPLICATES = AUDIT / "near_duplicates.csv"
BY_DISTANCE = AUDIT / "by_distance.csv"
COUNTS = AUDIT / "counts.json"
DESCRIBED = ("image_id", "split", "label", "patient_id", "collection")
NEAR_COLUMNS = ("distance", *(f"{column}_{side}" for side in "ab" for column in DESCRIBED))
SPLIT_PAIRS = tuple("_".join(pair) for pair in combinations(SPLITS, 2))
COUNTED = ("pairs", *SPLIT_PAIRS, "other_label", "same_patient")
TWINS = {split: f"{split}_images" for split in EVALUATED}  # with a near-duplicate in training

HASH_SIDE = 16  # the hash is of the lowest 16 x 16 frequencies: 256 bits
THRESHOLD = 24
LISTED = 200_000  # pairs at most that are listed, the closest; all are counted
BATCH = 2_000  # images that a process hashes at a time
CHUNK = 1 << 18  # pairs that are compared at a time, so that they stay in the processor's cache


# --- Near-duplicates -------------------------------------------------------------------------


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """Return the pHash of each of `images`, uint8 (N, side, side): uint64 (N, 4), 256 bits."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    parts = parallel_map(_hash, batches)
    return np.concatenate(list(progress(parts, f"x {BATCH} images", len(batches))))


def _hash(images: np.ndarray) -> np.ndarray:
    bits = [imagehash.phash(Image.fromarray(image), HASH_SIDE).hash.ravel() for image in images]
    return np.packbits(bits, axis=1).view(np.uint64)


def near_pairs(
    hashes: np.ndarray, groups: np.ndarray, threshold: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all pairs of different `groups` whose hashes differ in at most `threshold` bits.

    `hashes` is uint64 (N, words), `groups` (N,). Each part is three int64 arrays: rows in the lower
    group, rows in the higher one, and in how many bits they differ.
    """
    for low, high in combinations(np.unique(groups), 2):
        first, second = np.flatnonzero(groups == low), np.flatnonzero(groups == high)
        words = np.ascontiguousarray(hashes[second].T)
        step = max(1, CHUNK // len(second))
        for start in range(0, len(first), step):
            rows = first[start : start + step]
            distance = np.zeros((len(rows), len(second)), np.uint16)
            for word, others in zip(hashes[rows].T, words, strict=True):
                distance += np.bitwise_count(word[:, None] ^ others)
            a, b = np.nonzero(distance <= threshold)
            yield rows[a], second[b], distance[a, b].astype(np.int64)


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates between different splits.

    ``pairs``: NEAR_COLUMNS, closest first, then by image_id; `a` is the image of the split that
    comes first in SPLITS. At most LISTED: of pictures that are all alike there are billions.
    ``by_distance``: the number of all pairs: distance, same_patient, other_patient.
    ``counts``: the number of all pairs, COUNTED, and of the images in TWINS.
    """

    pairs: pd.DataFrame
    by_distance: pd.DataFrame
    counts: dict[str, int]


def find_near_duplicates(labelled: pd.DataFrame, hashes: np.ndarray) -> NearDuplicates:
    """List and count the near-duplicates between different splits.

    `labelled` is the manifest with the column split, sorted by image_id; row i of `hashes` is that
    of its row i.
    """
    n = len(labelled)
    split = labelled["split"].map(SPLITS.index).to_numpy(np.int64)
    patient, label = (pd.factorize(labelled[column])[0] for column in ("patient_id", "label"))
    tally = np.zeros((THRESHOLD + 1, 2), np.int64)  # by distance and same patient
    between = np.zeros((len(SPLITS), len(SPLITS)), np.int64)
    other_label = 0
    twin = np.zeros(n, bool)
    closest = np.empty(0, np.int64)  # distance and rows as one number, which sorts as wanted
    for a, b, distance in near_pairs(hashes, split, THRESHOLD):
        np.add.at(tally, (distance, (patient[a] == patient[b]).astype(int)), 1)
        np.add.at(between, (split[a], split[b]), 1)
        other_label += int((label[a] != label[b]).sum())
        twin[b[split[a] == SPLITS.index("train")]] = True
        closest = np.concatenate([closest, (distance * n + a) * n + b])
        if len(closest) > LISTED:
            closest = np.partition(closest, LISTED - 1)[:LISTED]
    counts = {"pairs": int(tally.sum()), "other_label": other_label}
    counts["same_patient"] = int(tally[:, 1].sum())
    pairs = zip(SPLIT_PAIRS, combinations(range(len(SPLITS)), 2), strict=True)
    counts |= {name: int(between[pair]) for name, pair in pairs}
    counts |= {name: int(twin[split == SPLITS.index(key)].sum()) for key, name in TWINS.items()}
    by_distance = pd.DataFrame({"same_patient": tally[:, 1], "other_patient": tally[:, 0]})
    by_distance = by_distance[by_distance.any(axis=1)].rename_axis("distance").reset_index()
    return NearDuplicates(_describe(labelled, np.sort(closest)), by_distance, counts)


def _describe(labelled: pd.DataFrame, numbers: np.ndarray) -> pd.DataFrame:
    distance, pair = np.divmod(numbers, len(labelled) ** 2)
    table = labelled[[*DESCRIBED]]
    sides = [
        table.iloc[rows].reset_index(drop=True).add_suffix(f"_{side}")
        for side, rows in zip("ab", np.divmod(pair, len(labelled)), strict=True)
    ]
    return pd.concat([pd.Series(distance, name="distance"), *sides], axis=1)


def read_audit(labelled: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read ``pairs`` (distance int64, the rest strings) and ``counts`` of `NearDuplicates`.

    Raises InputError if they are missing, or of other images than `labelled`.
    """
    pairs = read_table(NEAR_DUPLICATES, NEAR_COLUMNS).astype({"distance": np.int64})
    expected = f"counts of {', '.join(COUNTED)}"
    try:
        counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError([Problem(COUNTS, str(error), expected, REMEDY)]) from None
    known = labelled.set_index("image_id")["split"]
    for side in "ab":
        if not (pairs[f"image_id_{side}"].map(known) == pairs[f"split_{side}"]).all():
            found, expected = "other images or splits", "those of the split"
            raise InputError([Problem(NEAR_DUPLICATES, found, expected, REMEDY)])
    return pairs, counts


def worst_pairs(near_duplicates: pd.DataFrame, n: int) -> pd.DataFrame:
    """Return the `n` closest pairs, each image in one only: one volume would fill the table."""
    chosen, seen = [], set()
    for row, pair in enumerate(near_duplicates[["image_id_a", "image_id_b"]].to_numpy()):
        if len(chosen) < n and seen.isdisjoint(pair):
            chosen.append(row)
            seen.update(pair)
    return near_duplicates.iloc[chosen].reset_index(drop=True)


# --- What the splits hold, and what they share -----------------------------------------------


def composition(labelled: pd.DataFrame) -> pd.DataFrame:
    """Count images and patients of each label, collection and site in each split, and in all.

    `labelled` is the manifest with the column split. Columns label, collection, site, then
    train_images, train_patients, val_images and so on. In the last row, the total, a patient who is
    in several rows counts once.
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


def leak_counts(labelled: pd.DataFrame, counts: dict[str, int]) -> dict:
    """Return what the splits share, as a nested dict of numbers; shares from 0 to 1, 4 places.

    `labelled` is the manifest with the column split, `counts` those of `NearDuplicates`.
    ``shared``: patients and pixel contents in more than one split. ``near_duplicates``: pairs
    between splits. ``test_share``, ``external_share``: of these images, how many have their
    patient, or a near-duplicate, in training.
    """
    split, patient = labelled["split"], labelled["patient_id"]
    shared = {
        "patients": len(shared_between_splits(labelled, split, "patient_id")),
        "pixels": len(shared_between_splits(labelled, split, "pixel_hash")),
    }
    result = {"shared": shared, "near_duplicates": {name: counts[name] for name in COUNTED}}
    for name in EVALUATED:
        patients = patient[split == name]
        known = int(patients.isin(patient[split == "train"]).sum())
        result[f"{name}_share"] = {
            "patient_in_train": round(known / max(1, len(patients)), 4),
            "near_duplicate_in_train": round(counts[TWINS[name]] / max(1, len(patients)), 4),
        }
    return result
