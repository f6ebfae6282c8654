"""Figures within groups, by severity, and per patient."""

import math
from pathlib import Path

import pandas as pd
import pytest
from made import constant_system, make_manifest, make_system

from chest.evaluation.intervals import intervals
from chest.evaluation.patients import per_patient
from chest.evaluation.subgroups import (
    nest_groups,
    read_severity,
    score_groups,
    tabulate_groups,
    worst_group,
)

LABELLED = make_manifest(12)
TEST = make_system(LABELLED).of("test")


def test_each_group_is_scored_on_its_own_images():
    groups = {group.key: group for group in score_groups(TEST, 0)}
    assert {*groups} == {
        *("ct", "xray", "collection_ct_volumes", "collection_xrays"),
        *("site_moscow_ct", "site_tehran_ct", "site_montgomery_x_ray", "site_shenzhen_x_ray"),
        *("site_moscow_collection_ct_volumes", "site_tehran_collection_ct_volumes"),
        *("site_montgomery_collection_xrays", "site_shenzhen_collection_xrays"),
    }
    own = TEST[TEST["site"] == "Moscow"]
    assert groups["site_moscow_ct"].found == intervals(own, 0)
    assert nest_groups([groups["ct"]])["ct"]["images"] == (TEST["modality"] == "ct").sum()


def test_a_group_of_one_class_has_a_recall_and_no_uar():
    answers = TEST[(TEST["modality"] == "xray") | (TEST["actual"] == "covid19")]
    groups = score_groups(answers, 0)[:2]
    row = tabulate_groups("s", groups).iloc[0]
    assert math.isnan(row["uar"])
    assert 0 < row["covid19_recall"] < 1
    assert row["note"] == "one class only (covid19): recall only"
    assert "uar" not in nest_groups(groups)["ct"]


def test_recall_by_severity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    studies = sorted(set(TEST.loc[TEST["modality"] == "ct", "study"]))
    grade = {s: f"CT-{1 + i % 2}" if "covid19" in s else "CT-0" for i, s in enumerate(studies)}
    index = pd.DataFrame(
        {"study": studies, "volume": [f"studies/{grade[s]}/{s}.nii" for s in studies]}
    )
    Path("data/slices").mkdir(parents=True)
    index.to_csv("data/slices/index.csv", index=False)
    groups = score_groups(TEST, 0, read_severity())[-3:]
    assert [group.name for group in groups] == ["CT-0", "CT-1", "CT-2"]
    ones = TEST[TEST["study"].map(grade) == "CT-1"]
    assert groups[1].found.recall["covid19"].value == (ones["predicted"] == "covid19").mean()


def test_the_worst_group_has_the_lowest_recall_of_enough_patients():
    answers = TEST.copy()
    site = (answers["site"] == "Tehran") & (answers["actual"] == "covid19")
    answers.loc[site, "predicted"] = "normal"
    worst = worst_group(score_groups(answers, 0)[-4:])
    assert (worst.label, worst.group) == ("covid19", "Tehran, CT volumes")
    assert (worst.recall.value, worst.images, worst.patients) == (0, 12, 6)
    few = answers[answers["patient_id"].str.endswith(("000", "001"))]
    assert worst_group(score_groups(few, 0)) is None


def test_a_patients_answer_is_the_mean_over_the_images():
    patients = per_patient(TEST)
    assert len(patients) == TEST["patient_id"].nunique()
    assert set(patients["images"]) == {2}
    own = TEST[TEST["patient_id"] == patients["patient_id"][0]]
    assert patients["covid19"][0] == pytest.approx(own["covid19"].mean(), abs=1e-6)
    # All functions for answers per image take those per patient.
    assert intervals(patients, 0).uar.value > intervals(TEST, 0).uar.value - 0.1
    assert len(score_groups(patients, 0)) == len(score_groups(TEST, 0))


def test_a_patient_is_unparsed_only_if_all_images_are():
    answers = constant_system(LABELLED, "normal").of("test")
    first, second = answers.index[:2]
    answers.loc[first, ["predicted", "covid19", "normal", "tuberculosis"]] = [
        "unparsed",
        *[1 / 3] * 3,
    ]
    assert per_patient(answers)["predicted"][0] == "normal"
    answers.loc[second, "predicted"] = "unparsed"
    assert per_patient(answers)["predicted"][0] == "unparsed"
    # CT and X-ray of one person are two examinations.
    answers["patient_id"] = "one"
    assert len(per_patient(answers)) == 4
