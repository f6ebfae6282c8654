"""The split into training, validation and test: by patient, stratified, and checked."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from chest.errors import ChestError
from chest.labels import SPLITS


class SplitError(ChestError):
    """A split that lets the same patient or picture into two parts, or cannot be made."""


def assign_splits(
    manifest: pd.DataFrame,
    shares: Mapping[str, float],
    group: Literal["patient", "image"],
    seed: int,
) -> np.ndarray:
    """One of SPLITS for each row of `manifest`, an object array of shape (N,).

    Images that may not be separated (see `groups_of`) go to one split together. A stratum is the
    images of one label in one collection. Groups are taken largest first, in random order among
    equals, and each goes to the split that lags farthest behind its share of what has been dealt
    out in the group's strata so far: so every split gets large and small groups alike, and the
    small ones, which come last, even out what the large ones left.
    """
    strata = pd.factorize(manifest["label"] + "/" + manifest["collection"], sort=True)[0]
    groups = groups_of(manifest) if group == "patient" else np.arange(len(manifest))
    counts = np.zeros((groups.max() + 1, strata.max() + 1))  # images of each group in each stratum
    np.add.at(counts, (groups, strata), 1)
    sizes = counts.sum(0)
    dealt = np.zeros((len(SPLITS), len(sizes)))
    share = np.array([shares[split] for split in SPLITS])
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    chosen = np.empty(len(counts), np.int64)
    for i in order:
        due = np.outer(share, dealt.sum(0) + counts[i])
        lag = (due - dealt) / sizes  # relative, so that small strata count as much as large ones
        chosen[i] = np.argmax(lag[:, counts[i] > 0].sum(1))
        dealt[chosen[i]] += counts[i]
    return np.array(SPLITS, dtype=object)[chosen[groups]]


def groups_of(manifest: pd.DataFrame) -> np.ndarray:
    """Group number of each row, int64 (N,): same patient or same pixels, joined transitively."""
    n = len(manifest)
    patient = pd.factorize(manifest["patient_id"])[0]
    pixels = pd.factorize(manifest["pixel_hash"])[0] + patient.max() + 1
    rows = np.arange(n)
    # A graph of images, patients and pixel contents: its connected parts are the groups.
    size = n + int(pixels.max()) + 1
    ends = np.concatenate([patient, pixels]) + n
    edges = coo_array((np.ones(2 * n, bool), (np.concatenate([rows, rows]), ends)), (size, size))
    part = connected_components(edges, directed=False)[1][:n]
    return pd.factorize(part)[0].astype(np.int64)


def shared_between_splits(manifest: pd.DataFrame, split: Sequence[str], column: str) -> list[str]:
    """The values of `column` (patient_id or pixel_hash) that occur in more than one split."""
    parts = pd.Series(np.asarray(split)).groupby(manifest[column].to_numpy()).nunique()
    return sorted(parts.index[parts > 1])


def check_split(manifest: pd.DataFrame, split: Sequence[str], group: str) -> None:
    """Raise SplitError where a split is empty, or (by patient) a patient or picture is in two."""
    empty = [name for name in SPLITS if name not in set(split)]
    if empty:
        raise SplitError(f"no image in {', '.join(empty)}: too few patients for these shares")
    if group == "image":
        return
    for column in ("patient_id", "pixel_hash"):
        shared = shared_between_splits(manifest, split, column)
        if shared:
            raise SplitError(f"{len(shared)} {column}s in more than one split: {shared[:5]}")


def share_table(manifest: pd.DataFrame, split: Sequence[str]) -> pd.DataFrame:
    """Share of each split in each stratum (label and collection), rows strata, columns SPLITS."""
    table = pd.crosstab(
        [manifest["label"], manifest["collection"]], np.asarray(split), normalize="index"
    )
    return table.reindex(columns=list(SPLITS), fill_value=0.0).rename_axis(columns=None)
