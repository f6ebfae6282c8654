"""Splits at the study's true size: by patient, stratified, external sites, folds, repeatable."""

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from chest.core.errors import ParameterError
from chest.core.labels import SPLITS
from chest.data.splits import (
    Split,
    SplitError,
    assign_splits,
    check_split,
    patient_groups,
    share_table,
    shared_between_splits,
)


def settings(**changes):
    values = {"train": 0.8, "val": 0.1, "test": 0.1, "group": "patient"}
    return Split(**values | {"external": [], "folds": None, "fold": 0} | changes)


@pytest.fixture(scope="module")
def study():
    """A manifest like the study's: 304 MosMed patients are in both CT collections."""
    rng = np.random.default_rng(0)
    people = [(f"mosmed-{i:04}", "normal", 20) for i in range(254)]
    people += [(f"n{i}", "normal", k) for i, k in enumerate(rng.geometric(1 / 5, 350))]
    people += [(f"mosmed-{i:04}", "covid19", 16) for i in range(254, 304)]
    people += [(f"c{i}", "covid19", k) for i, k in enumerate(rng.geometric(1 / 16, 414))]
    rows = [(p, label, "ct_slices") for p, label, k in people for _ in range(k)]
    rows += [(f"mosmed-{i:04}", "normal", "ct_volumes") for i in range(254)]
    rows += [(f"mosmed-{i:04}", "covid19", "ct_volumes") for i in range(254, 1110)]
    rows += [(f"x{i}", "tuberculosis", "xrays") for i in range(345)]
    rows += [(f"x{i}", "normal", "xrays") for i in range(345, 704)]
    table = pd.DataFrame(rows, columns=["patient_id", "label", "collection"])
    table["pixel_hash"] = [f"{i:x}" for i in range(len(table))]
    sites = {"m": "Moscow", "x": "Shenzhen", "n": "Tehran", "c": "Tehran"}
    table["site"] = table["patient_id"].str[0].map(sites)
    montgomery = (table["collection"] == "xrays") & (table.index % 5 == 0)
    table.loc[montgomery, "site"] = "Montgomery"
    return table


@pytest.mark.parametrize("seed", [0, 42])
def test_shares_hold_in_each_class_of_each_collection(study, seed):
    split = assign_splits(study, settings(), seed)
    check_split(study, split, "patient")
    table = share_table(study, split)
    assert list(table.columns) == list(SPLITS)
    assert np.abs(table.to_numpy() - [0.8, 0.1, 0.1, 0]).max() < 0.01
    assert (split == assign_splits(study, settings(), seed)).all()
    assert (split != assign_splits(study, settings(), seed + 1)).mean() > 0.1
    # Large and small patients are in every split.
    people = pd.DataFrame({"split": split}).groupby(study["patient_id"].to_numpy())
    people = people["split"].agg(["size", "first"])
    assert set(people.nlargest(60, "size")["first"]) == {"train", "val", "test"}
    assert people["first"].value_counts(normalize=True)["test"] == pytest.approx(0.1, abs=0.03)


def test_patients_who_share_a_picture_stay_together(study):
    table = study.copy()
    a, b, c = (table.index[table["patient_id"] == p] for p in ("c1", "c2", "c3"))
    table.loc[[a[0], b[0]], "pixel_hash"] = "same"
    table.loc[[b[-1], c[0]], "pixel_hash"] = "also" if len(b) > 1 else "same"
    groups = patient_groups(table)
    assert len({*groups[a], *groups[b], *groups[c]}) == 1
    assert len(set(groups)) == table["patient_id"].nunique() - 2
    split = assign_splits(table, settings(), 3)
    assert len({*split[a], *split[b], *split[c]}) == 1


def test_external_takes_every_patient_seen_at_the_sites(study):
    table = study.copy()
    visitor = table["patient_id"] == "n0"  # one image in Montgomery, the others in Tehran
    table.loc[table.index[visitor][0], "site"] = "Montgomery"
    for group in ("patient", "image"):
        split = assign_splits(table, settings(external=["Montgomery"], group=group), 42)
        check_split(table, split, group)
        expected = visitor | (table["site"] == "Montgomery")
        assert ((split == "external") == expected).all()
        inside = share_table(table[~expected], split[~expected])
        assert np.abs(inside.to_numpy() - [0.8, 0.1, 0.1, 0]).max() < 0.02


def test_unknown_sites_are_refused_with_those_there_are(study):
    with pytest.raises(ParameterError, match="'Atlantis'; the sites are 'Montgomery', 'Moscow'"):
        assign_splits(study, settings(external=["Moscow", "Atlantis"]), 42)


@pytest.mark.parametrize("folds", [3, 5])
def test_folds_test_every_image_once(study, folds):
    splits = [assign_splits(study, settings(folds=folds, fold=i), 42) for i in range(folds)]
    tested = np.array([split == "test" for split in splits])
    assert (tested.sum(0) == 1).all()
    for i, split in enumerate(splits):
        check_split(study, split, "patient")
        assert np.array_equal(split == "val", tested[(i + 1) % folds])
        table = share_table(study, split)["test"]
        assert np.abs(table - 1 / folds).max() < 0.02


def test_folds_may_hold_a_site_out(study):
    split = assign_splits(study, settings(folds=4, fold=3, external=["Shenzhen"]), 42)
    check_split(study, split, "patient")
    assert set(split[study["site"] == "Shenzhen"]) == {"external"}
    assert (split == "test").sum() == pytest.approx((split != "external").sum() / 4, rel=0.02)


def test_the_published_protocol_puts_patients_on_both_sides(study):
    split = assign_splits(study, settings(group="image"), 42)
    check_split(study, split, "image")
    slices = (study["collection"] == "ct_slices").to_numpy()
    known = set(study["patient_id"][slices & (split == "train")])
    assert study["patient_id"][slices & (split == "test")].isin(known).mean() > 0.95
    assert len(shared_between_splits(study, split, "patient_id")) > 500


@pytest.mark.parametrize("column", ["patient_id", "pixel_hash"])
@pytest.mark.parametrize(("group", "other"), [("patient", "test"), ("image", "external")])
def test_a_leak_is_noticed(study, column, group, other):
    table = study.copy()
    split = assign_splits(table, settings(group=group, external=["Montgomery"]), 42)
    train, leaked = (np.flatnonzero(split == name)[0] for name in ("train", other))
    table.loc[leaked, column] = table.loc[train, column]
    with pytest.raises(SplitError, match=f"1 {column}s in more than one split"):
        check_split(table, split, group)


def test_too_few_patients_are_refused(study):
    few = study[study["patient_id"].isin(["c1", "c2"])].reset_index(drop=True)
    with pytest.raises(SplitError, match="no image in"):
        check_split(few, assign_splits(few, settings(), 1), "patient")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"val": 0.2}, "add up to 1.1"),
        ({"folds": 2}, "folds"),
        ({"folds": 5, "fold": 5}, "fold must be less than folds"),
        ({"fold": 1}, "fold must be less than folds"),
        ({"group": "slice"}, "group"),
    ],
)
def test_settings_are_checked(changes, told):
    with pytest.raises(ValidationError, match=told):
        settings(**changes)
