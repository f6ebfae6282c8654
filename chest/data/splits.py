"""The split into training, validation, test and external images, by patient and stratified."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from chest.core.errors import ChestError, ParameterError
from chest.core.labels import SPLITS
from chest.core.params import Count, Section, Share, Text


class SplitError(ChestError):
    """A split that shares a patient or picture between two parts, or leaves a part empty."""


class Split(Section):
    """The block ``split`` of params.yaml.

    With ``folds``, the shares are not used; without ``seed``, it is that of all stages.
    """

    train: Share
    val: Share
    test: Share
    group: Literal["patient", "image"]
    external: list[Text]
    folds: Annotated[int, Field(ge=3, le=100)] | None
    fold: Count
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    @model_validator(mode="after")
    def _check(self):
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train, val and test add up to {total:g}, not to 1")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold must be less than folds, and 0 without folds, not {self.fold}")
        return self


def assign_splits(manifest: pd.DataFrame, settings: Split, seed: int) -> np.ndarray:
    """Return one of SPLITS for each row of `manifest`, an object array of shape (N,).

    Images of one patient, or with the same pixels, stay together unless ``group`` is "image". Every
    patient seen at one of the sites ``external`` goes to that split, whatever the group. The rest
    is dealt out by shares or, with ``folds``, into folds of equal size: fold ``fold`` is the test
    split, the next one the validation split. Raises ParameterError if a site is unknown.
    """
    patients = patient_groups(manifest)
    held_out = np.isin(patients, patients[_at_sites(manifest, settings.external)])
    groups = patients if settings.group == "patient" else np.arange(len(manifest))
    inside = np.flatnonzero(~held_out)
    strata = manifest["label"] + "/" + manifest["collection"]
    split = np.full(len(manifest), "external", dtype=object)
    if settings.folds:
        shares = np.full(settings.folds, 1 / settings.folds)
        folds = deal(groups[inside], strata.iloc[inside], shares, seed)
        names = {settings.fold: "test", (settings.fold + 1) % settings.folds: "val"}
        split[inside] = [names.get(fold, "train") for fold in folds]
    else:
        shares = np.array([settings.train, settings.val, settings.test])
        parts = deal(groups[inside], strata.iloc[inside], shares, seed)
        split[inside] = np.array(["train", "val", "test"], dtype=object)[parts]
    return split


def deal(groups: np.ndarray, strata: Sequence[str], shares: np.ndarray, seed: int) -> np.ndarray:
    """Deal images out to ``len(shares)`` parts; return the part of each, int64, (N,).

    Images with the same number in `groups` go to one part. Groups are dealt largest first, in
    random order among equals, each to the part that lags farthest behind its share of what has been
    dealt in the group's strata so far: so every part gets large and small groups alike, and the
    small ones, which come last, even out what the large ones left.
    """
    if not len(groups):
        return np.empty(0, np.int64)
    group, stratum = pd.factorize(groups)[0], pd.factorize(strata, sort=True)[0]
    counts = np.zeros((group.max() + 1, stratum.max() + 1))  # images per group and stratum
    np.add.at(counts, (group, stratum), 1)
    sizes = counts.sum(0)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    dealt = np.zeros((len(shares), len(sizes)))
    chosen = np.empty(len(counts), np.int64)
    for i in order:
        due = np.outer(shares, dealt.sum(0) + counts[i])
        lag = (due - dealt) / sizes  # relative, so that small strata count as much as large ones
        chosen[i] = np.argmax(lag[:, counts[i] > 0].sum(1))
        dealt[chosen[i]] += counts[i]
    return chosen[group]


def patient_groups(manifest: pd.DataFrame) -> np.ndarray:
    """Return a group number per row, int64 (N,): same patient or same pixels, transitively."""
    n = len(manifest)
    patient = pd.factorize(manifest["patient_id"])[0]
    pixels = pd.factorize(manifest["pixel_hash"])[0] + patient.max(initial=0) + 1
    # A graph of images, patients and pixel contents; its connected components are the groups.
    images = np.tile(np.arange(n), 2)
    others = np.concatenate([patient, pixels]) + n
    size = n + pixels.max(initial=0) + 1
    edges = coo_array((np.ones(2 * n, bool), (images, others)), (size, size))
    return connected_components(edges, directed=False)[1][:n].astype(np.int64)


def _at_sites(manifest: pd.DataFrame, sites: Sequence[str]) -> np.ndarray:
    known = set(manifest["site"])
    unknown = sorted({*sites} - known)
    if unknown:
        raise ParameterError(
            f"params.yaml: split.external: no image is from {', '.join(map(repr, unknown))}; "
            f"the sites are {', '.join(map(repr, sorted(known)))}"
        )
    return manifest["site"].isin(sites).to_numpy()


def shared_between_splits(manifest: pd.DataFrame, split: Sequence[str], column: str) -> list[str]:
    """Return the values of `column` (patient_id or pixel_hash) that are in more than one split."""
    parts = pd.Series(np.asarray(split)).groupby(manifest[column].to_numpy()).nunique()
    return sorted(parts.index[parts > 1])


def check_split(
    manifest: pd.DataFrame, split: np.ndarray, group: Literal["patient", "image"]
) -> None:
    """Raise SplitError if a split is empty, or a patient or picture is in two.

    With images as groups only `external` must share none; it may be empty either way.
    """
    empty = [name for name in ("train", "val", "test") if name not in set(split)]
    if empty:
        raise SplitError(f"no image in {', '.join(empty)}: too few patients for this split")
    parts = split if group == "patient" else split == "external"
    for column in ("patient_id", "pixel_hash"):
        shared = shared_between_splits(manifest, parts, column)
        if shared:
            raise SplitError(f"{len(shared)} {column}s in more than one split: {shared[:5]}")


def share_table(manifest: pd.DataFrame, split: Sequence[str]) -> pd.DataFrame:
    """Return the share of each split in each stratum (label and collection); columns SPLITS."""
    strata = [manifest["label"], manifest["collection"]]
    table = pd.crosstab(strata, np.asarray(split), normalize="index")
    return table.reindex(columns=list(SPLITS), fill_value=0.0).rename_axis(columns=None)
