"""The split at the study's true size: by patient, stratified, repeatable."""

import numpy as np
import pandas as pd
import pytest

from chest.labels import SPLITS
from chest.splitting import (
    SplitError,
    assign_splits,
    check_split,
    groups_of,
    share_table,
    shared_between_splits,
)

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def sizes(rng, people, images):
    """How many images each of `people` has, with a long tail; they add up to `images`."""
    weights = rng.pareto(1.2, people) + 0.05
    counts = np.maximum(1, np.floor(weights / weights.sum() * (images - people)).astype(int))
    counts[np.argsort(-counts)[: images - counts.sum()]] += 1
    counts[counts.argmax()] += images - counts.sum()
    return counts


@pytest.fixture(scope="module")
def study():
    """A manifest of the study's 16,300 images: 304 MosMed patients are in both CT collections."""
    rng = np.random.default_rng(0)
    normal = [(f"mosmed-{i:04}", "normal", 20) for i in range(254)]
    normal += [(f"n{i}", "normal", k) for i, k in enumerate(sizes(rng, 350, 6893 - 254 * 20))]
    covid = [(f"mosmed-{254 + i:04}", "covid19", k) for i, k in enumerate(sizes(rng, 50, 785))]
    covid += [(f"c{i}", "covid19", k) for i, k in enumerate(sizes(rng, 414, 7593 - 785))]
    rows = [(p, label, "ct_slices") for p, label, k in normal + covid for _ in range(k)]
    rows += [(f"mosmed-{i:04}", "normal", "ct_volumes") for i in range(254)]
    rows += [(f"mosmed-{254 + i:04}", "covid19", "ct_volumes") for i in range(856)]
    rows += [(f"x{i}", "tuberculosis", "xrays") for i in range(345)]
    rows += [(f"x{345 + i}", "normal", "xrays") for i in range(359)]
    table = pd.DataFrame(rows, columns=["patient_id", "label", "collection"])
    table["pixel_hash"] = [f"{i:x}" for i in range(len(table))]
    return table


def test_the_made_manifest_has_the_studys_counts(study):
    counts = study["label"].value_counts().to_dict()
    assert counts == {"covid19": 8449, "normal": 7506, "tuberculosis": 345}
    assert study["patient_id"].nunique() == 464 + 604 + 1110 - 304 + 704


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_each_share_holds_in_each_class_of_each_collection(study, seed):
    split = assign_splits(study, SHARES, "patient", seed)
    check_split(study, split, "patient")
    for table in (
        share_table(study, split),
        pd.crosstab(study["label"], split, normalize="index")[list(SPLITS)],
    ):
        assert np.abs(table.to_numpy() - list(SHARES.values())).max() < 0.01


def test_the_largest_patients_are_not_all_in_training(study):
    split = assign_splits(study, SHARES, "patient", 42)
    people = (
        study.assign(split=split)
        .groupby("patient_id")
        .agg(n=("split", "size"), s=("split", "first"))
    )
    assert set(people.nlargest(60, "n")["s"]) == set(SPLITS)
    assert people["s"].value_counts(normalize=True)["test"] == pytest.approx(0.1, abs=0.03)


def test_no_patient_is_in_two_splits(study):
    split = assign_splits(study, SHARES, "patient", 42)
    parts = pd.Series(split).groupby(study["patient_id"].to_numpy()).nunique()
    assert parts.max() == 1
    assert shared_between_splits(study, split, "patient_id") == []


def test_the_seed_decides(study):
    first, again, other = (assign_splits(study, SHARES, "patient", s) for s in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).mean() > 0.1


def test_people_who_share_a_picture_stay_together(study):
    # Two copies of a picture join two patients, another one joins them with a third.
    table = study.copy()
    a, b, c = (table.index[table["patient_id"] == p] for p in ("c1", "c2", "c3"))
    table.loc[[a[0], b[0]], "pixel_hash"] = "same"
    table.loc[[b[-1], c[0]], "pixel_hash"] = "also" if len(b) > 1 else "same"
    groups = groups_of(table)
    assert len({*groups[a], *groups[b], *groups[c]}) == 1
    assert groups.max() + 1 == table["patient_id"].nunique() - 2
    for seed in range(5):
        split = assign_splits(table, SHARES, "patient", seed)
        assert len({*split[a], *split[b], *split[c]}) == 1
        check_split(table, split, "patient")


def test_the_published_protocol_puts_most_patients_on_both_sides(study):
    split = assign_splits(study, {"train": 0.8, "val": 0.1, "test": 0.1}, "image", 42)
    check_split(study, split, "image")
    slices = (study["collection"] == "ct_slices").to_numpy()
    known = set(study["patient_id"][slices & (split == "train")])
    test = study["patient_id"][slices & (split == "test")]
    assert test.isin(known).mean() > 0.95


@pytest.mark.parametrize("column", ["patient_id", "pixel_hash"])
def test_a_leak_is_noticed(study, column):
    table = study.copy()
    split = assign_splits(table, SHARES, "patient", 42)
    train, test = np.flatnonzero(split == "train")[0], np.flatnonzero(split == "test")[0]
    table.loc[test, column] = table.loc[train, column]
    with pytest.raises(SplitError, match=f"1 {column}s in more than one split"):
        check_split(table, split, "patient")


def test_too_few_patients_are_refused(study):
    few = study[study["patient_id"].isin(["c1", "c2"])].reset_index(drop=True)
    with pytest.raises(SplitError, match="no image in"):
        check_split(few, assign_splits(few, SHARES, "patient", 1), "patient")
