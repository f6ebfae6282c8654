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
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from chest.errors import InputError, Problem, refuse
from chest.files import read_json, read_table
from chest.labels import SPLITS
from chest.progress import progress, workers
from chest.splitting import shared_between_splits

AUDIT = Path("data/audit")
NEAR_DUPLICATES = AUDIT / "near_duplicates.csv"
BY_DISTANCE = AUDIT / "by_distance.csv"
COUNTS = AUDIT / "counts.json"
DESCRIBED = ("image_id", "split", "label", "patient_id", "collection")
NEAR_COLUMNS = ("distance", *(f"{column}_{side}" for side in "ab" for column in DESCRIBED))
SPLIT_PAIRS = tuple("_".join(pair) for pair in combinations(SPLITS, 2))
COUNTED = ("pairs", "train_test", "train_val", "val_test", "other_label", "same_patient")
TWINNED = "test_images"  # beside COUNTED: images of test that have a near-duplicate in training

HASH_SIDE = 16  # the hash is of the lowest 16 x 16 frequencies: 256 bits
THRESHOLD = 24
LISTED = 200_000  # pairs at most that are listed, the closest; all are counted, however many
BATCH = 256  # images that a worker hashes at a time
CHUNK = 1 << 20  # pairs that are compared at a time: some 150 MB


REMEDY = "run `dvc repro audit` to make it again"

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
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of rows of different `groups` whose hashes differ in at most `threshold` bits.

    `hashes` is uint64 (N, words), `groups` (N,). Yields each pair once, in parts of at most CHUNK:
    the rows in the lower and in the higher group, int64, and in how many bits they differ.

    The bits are dealt to threshold // 2 + 1 bands or more. Two hashes that differ in two or more
    bits of every band differ in more than `threshold` in all: so only pairs that differ in at most
    one bit of some band are compared, and none is missed. Memory is bounded however many share a
    band; and where nearly all do, each pair is compared once and not once a band.
    """
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    count = max(threshold // 2 + 1, hashes.shape[1])  # at most 64 bits a band: a number holds them
    # Every so many bits: each band has coarse structure, which chests share, and fine detail.
    masks = np.arange(bits.shape[1]) % count == np.arange(count)[:, None]
    words = np.packbits(masks, axis=1).view(np.uint64)
    for low, high in combinations(np.unique(groups), 2):
        first, second = np.flatnonzero(groups == low), np.flatnonzero(groups == high)
        bands = [Band(bits[first][:, mask], bits[second][:, mask]) for mask in masks]
        if sum(band.count() for band in bands) < len(first) * len(second):
            candidates = ((k, *pair) for k, band in enumerate(bands) for pair in band.pairs())
        else:
            candidates = ((0, *pair) for pair in _spread_out(np.full(len(first), len(second))))
        for k, a, b in candidates:
            yield _keep_near(hashes, first[a], second[b], threshold, words[:k])


def _keep_near(
    hashes: np.ndarray, a: np.ndarray, b: np.ndarray, threshold: int, earlier: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The near ones of the pairs `a`, `b`, but those that an `earlier` band found; their distance.

    `earlier` are the masks of these bands, uint64 (bands, words).
    """
    distance = sum(np.bitwise_count(word[a] ^ word[b]).astype(np.int64) for word in hashes.T)
    near = distance <= threshold
    a, b, distance = a[near], b[near], distance[near]
    new = np.ones(len(a), bool)
    for mask in earlier:
        new &= np.bitwise_count((hashes[a] ^ hashes[b]) & mask).sum(1) > 1
    return a[new], b[new], distance[new]


class Band:
    """The pairs of two sets of hashes that differ in at most one bit of a band.

    `first` and `second` are the band's bits, (n, width) and (m, width). For each bit that may
    differ (or none), those of one set that fit a hash of the other stand side by side in its order.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray):
        bits = 1 << np.arange(first.shape[1])
        self.flips = (0, *bits.tolist())
        first, second = first @ bits, second @ bits
        self.orders = np.argsort(first, kind="stable"), np.argsort(second, kind="stable")
        self.keys = first[self.orders[0]], second[self.orders[1]]

    def count(self) -> int:
        """How many pairs there are."""
        return sum(int(counts.sum()) for _, counts in map(self._fitting, self.flips))

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pairs, CHUNK at a time: rows of `first` and of `second`, int64."""
        for starts, counts in map(self._fitting, self.flips):
            for row, place in _spread_out(counts):
                yield self.orders[0][starts[row] + place], self.orders[1][row]

    def _fitting(self, flip: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the first's order those begin that fit each of the second, and how many."""
        wanted = self.keys[1] ^ flip
        starts = np.searchsorted(self.keys[0], wanted, "left")
        return starts, np.searchsorted(self.keys[0], wanted, "right") - starts


def _spread_out(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """i and 0, i and 1, up to i and counts[i] - 1, for each i: int64, CHUNK at a time."""
    ends = np.cumsum(counts)
    for low in range(0, int(counts.sum()), CHUNK):
        pair = np.arange(low, min(low + CHUNK, ends[-1]))
        row = np.searchsorted(ends, pair, "right")
        yield row, pair - (ends - counts)[row]


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates in two splits.

    ``pairs``: NEAR_COLUMNS, closest first, then by image_id; `a` is the image of the split that
    comes first (train, val, test). At most LISTED of them: more would help nobody, and of pictures
    that are all alike there are billions.
    ``by_distance``: how many pairs there are in all: distance, same_patient, other_patient.
    ``counts``: how many there are in all, COUNTED, and how many TWINNED.
    """

    pairs: pd.DataFrame
    by_distance: pd.DataFrame
    counts: dict[str, int]


def find_near_duplicates(labelled: pd.DataFrame, hashes: np.ndarray) -> NearDuplicates:
    """List and count the near-duplicates in two splits.

    `labelled` is the manifest with the column split, row i of `hashes` that of its row i.
    """
    n, split = len(labelled), labelled["split"].map(SPLITS.index).to_numpy(np.int64)
    patient, label = (pd.factorize(labelled[column])[0] for column in ("patient_id", "label"))
    order = np.argsort(labelled["image_id"].to_numpy(), kind="stable")
    place = np.argsort(order)  # of each row among the image ids
    shape = THRESHOLD + 1, len(SPLIT_PAIRS), 2, 2
    tally, closest, twinned = np.zeros(shape, np.int64), np.empty(0, np.int64), np.zeros(n, bool)
    for a, b, distance in near_pairs(hashes, split, THRESHOLD):
        pair = split[a] + split[b] - 1  # its number in SPLIT_PAIRS
        cell = distance, pair, label[a] != label[b], patient[a] == patient[b]
        cells = np.ravel_multi_index(tuple(x.astype(np.int64) for x in cell), shape)
        tally += np.bincount(cells, minlength=tally.size).reshape(shape)
        twinned[b[pair == SPLIT_PAIRS.index("train_test")]] = True
        closest = _least([closest, (distance * n + place[a]) * n + place[b]], LISTED)
    distance, pair = np.divmod(np.sort(closest), n * n)
    pairs = _describe(labelled, distance, *(order[x] for x in np.divmod(pair, n)))
    return NearDuplicates(pairs, _by_distance(tally), _count(tally) | {TWINNED: int(twinned.sum())})


def _least(parts: list[np.ndarray], n: int) -> np.ndarray:
    """The `n` least numbers of `parts`, or all of them; in any order."""
    numbers = np.concatenate(parts)
    return numbers if len(numbers) <= n else np.partition(numbers, n - 1)[:n]


def _describe(
    labelled: pd.DataFrame, distance: np.ndarray, a: np.ndarray, b: np.ndarray
) -> pd.DataFrame:
    sides = [
        labelled[list(DESCRIBED)].iloc[rows].reset_index(drop=True).add_suffix(f"_{side}")
        for side, rows in (("a", a), ("b", b))
    ]
    return pd.concat([pd.Series(distance, name="distance"), *sides], axis=1)


def _by_distance(tally: np.ndarray) -> pd.DataFrame:
    other, same = tally.sum((1, 2)).T
    counts = pd.DataFrame({"same_patient": same, "other_patient": other}).rename_axis("distance")
    return counts[counts.any(axis=1)].reset_index()


def _count(tally: np.ndarray) -> dict[str, int]:
    """COUNTED of a `tally` of pairs by distance, splits, other label and same patient."""
    by_splits = dict(zip(SPLIT_PAIRS, tally.sum((0, 2, 3)).tolist(), strict=True))
    other_label, same_patient = tally[:, :, 1].sum(), tally[..., 1].sum()
    found = {"pairs": tally.sum(), "other_label": other_label, "same_patient": same_patient}
    return {name: int((by_splits | found)[name]) for name in COUNTED}


def read_audit(labelled: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """What `read_near_duplicates` and `read_counts` read, of the images of `labelled`.

    Raises InputError where it is of others: `labelled` is the manifest with the column split.
    """
    pairs, counts = read_near_duplicates(), read_counts()
    known = labelled.set_index("image_id")[list(DESCRIBED[1:])]
    problems = []
    for side in "ab":
        told = pairs[[f"{column}_{side}" for column in DESCRIBED]].set_index(f"image_id_{side}")
        other = (told.to_numpy() != known.reindex(told.index).to_numpy()).any(axis=1)
        if other.any():
            found = f"another image than in the manifest: {told.index[other][0]!r}"
            problems.append(
                Problem(NEAR_DUPLICATES, found, "its images, as they are there", REMEDY)
            )
    between = pairs["split_a"] + "_" + pairs["split_b"]
    listed = between.value_counts()
    if {*between} - {*SPLIT_PAIRS} or any(n > counts[name] for name, n in listed.items()):
        found, expected = "other pairs than were counted", f"of {', '.join(SPLIT_PAIRS)}"
        problems.append(Problem(NEAR_DUPLICATES, found, expected, REMEDY))
    of_test = int((labelled["split"] == "test").sum())
    if counts[TWINNED] > of_test:
        found, expected = f"{TWINNED}: {counts[TWINNED]}", f"at most {of_test}, as the split has"
        problems.append(Problem(COUNTS, found, expected, REMEDY))
    refuse(problems)
    return pairs, counts


def read_near_duplicates() -> pd.DataFrame:
    """``data/audit/near_duplicates.csv``: strings, but for the distance, which is a number.

    Raises InputError where the file is missing, has other columns, a distance is none, or a pair is
    there twice.
    """
    table = read_table(NEAR_DUPLICATES, NEAR_COLUMNS)
    try:
        table = table.astype({"distance": np.int64})
    except ValueError as error:
        raise InputError([Problem(NEAR_DUPLICATES, str(error), "distances", REMEDY)]) from None
    if not table["distance"].between(0, THRESHOLD).all():
        expected = f"distances from 0 to {THRESHOLD}"
        raise InputError([Problem(NEAR_DUPLICATES, "other distances", expected, REMEDY)])
    if table.duplicated(["image_id_a", "image_id_b"]).any():
        raise InputError([Problem(NEAR_DUPLICATES, "pairs doubled", "each pair once", REMEDY)])
    return table


def read_counts() -> dict[str, int]:
    """``data/audit/counts.json``: COUNTED and TWINNED, of all pairs, those that are not listed too.

    Raises InputError where the file is missing, holds anything else, or contradicts itself.
    """
    names = (*COUNTED, TWINNED)
    counts = read_json(COUNTS, "numbers of pairs", REMEDY)
    if {*counts} != {*names} or not all(type(n) is int and n >= 0 for n in counts.values()):
        found = ", ".join(counts)[:80] if {*counts} != {*names} else "what is no number"
        raise InputError([Problem(COUNTS, found, f"numbers: {', '.join(names)}", REMEDY)])
    pairs, between = counts["pairs"], [counts[name] for name in SPLIT_PAIRS]
    twinned = counts[TWINNED], counts["train_test"]
    if (
        pairs != sum(between)
        or max(counts["other_label"], counts["same_patient"]) > pairs
        or twinned[0] > twinned[1]
        or (twinned[0] == 0) != (twinned[1] == 0)
    ):
        raise InputError([Problem(COUNTS, str(counts), "counts that add up", REMEDY)])
    return counts


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


def leak_counts(labelled: pd.DataFrame, near_duplicates: dict[str, int]) -> dict:
    """What the splits share, as a nested dict of numbers; shares from 0 to 1 of 4 places.

    `labelled` is the manifest with the column split, `near_duplicates` the counts of
    `NearDuplicates`. ``shared``: patients and pixel contents in more than one split.
    ``near_duplicates``: pairs across splits, in all, by pair of splits, of different labels, of one
    patient. ``test_share``: of the test images, how many have their patient, or a near-duplicate,
    in training.
    """
    split, patient = labelled["split"], labelled["patient_id"]
    of_test = patient[split == "test"]
    return {
        "shared": {
            "patients": len(shared_between_splits(labelled, split, "patient_id")),
            "pixels": len(shared_between_splits(labelled, split, "pixel_hash")),
        },
        "near_duplicates": {name: near_duplicates[name] for name in COUNTED},
        "test_share": {
            "patient_in_train": _share(of_test.isin(patient[split == "train"]).sum(), len(of_test)),
            "near_duplicate_in_train": _share(near_duplicates[TWINNED], len(of_test)),
        },
    }


def _share(count: int, total: int) -> float:
    return round(float(count / total), 4) if total else 0.0
