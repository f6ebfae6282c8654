"""Intervals: coverage on simulated cases, certainty where there is some, and only there."""

import numpy as np
import pandas as pd
import pytest
from made import constant_system, make_manifest, make_system
from scipy.stats import beta, norm

from chest.evaluation.calibration import calibration_metrics, reliability, wilson
from chest.evaluation.intervals import Interval, intervals
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.roc import auroc

REPETITIONS, DRAWS = 100, 1000
# Of 100 simulated intervals so many hold the truth in 999 of 1,000 cases if coverage is 93 %;
# `make soak` looks closer.
LEAST = 0.84


def draw_answers(rng, recalls, patients=30):
    """Return answers to images of patients that differ in how hard they are."""
    rows = []
    for label, other, recall in (
        ("covid19", "normal", recalls[0]),
        ("normal", "covid19", recalls[1]),
    ):
        for p in range(patients):
            right = rng.random(rng.integers(1, 8)) < rng.beta(6 * recall, 6 * (1 - recall))
            rows += [(f"{label}{p}", label, label if r else other) for r in right]
    return pd.DataFrame(rows, columns=["patient_id", "actual", "predicted"])


def test_intervals_of_uar_and_recall_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(REPETITIONS):
        found = intervals(draw_answers(rng, (0.8, 0.9)), seed, DRAWS)
        pairs = ((found.uar, 0.85), (found.recall["covid19"], 0.8), (found.recall["normal"], 0.9))
        hits.append([x.low <= truth <= x.high for x, truth in pairs])
    assert (np.mean(hits, axis=0) >= LEAST).all()
    assert np.mean(hits) < 0.995  # not by being too wide


@pytest.mark.parametrize("distance", [0.5, 2.0])
def test_intervals_of_the_auroc_cover_the_truth(distance):
    rng = np.random.default_rng(1)
    truth, hits = norm.cdf(distance / np.sqrt(2)), 0
    for seed in range(REPETITIONS):
        size = rng.integers(1, 4, 50)
        patient = np.repeat(np.arange(50), size)
        sick = patient % 2 == 1
        trait = rng.normal(size=50)[patient]  # what a patient's images share
        score = distance * sick + (trait + rng.normal(size=len(patient))) / np.sqrt(2)
        found = auroc(patient, sick, score, seed, DRAWS)
        hits += found.low <= truth <= found.high
    assert LEAST <= hits / REPETITIONS < 0.995


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_intervals_of_the_calibration_error_cover_the_truth(error):
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(REPETITIONS):
        p = rng.uniform(0.6, 0.95, 150)
        right = rng.random(150) < p - error
        table = pd.DataFrame({"patient_id": np.arange(150), "actual": "covid19"})
        table["covid19"], table["normal"] = np.where(right, [p, 1 - p], [1 - p, p])
        table = table.assign(tuberculosis=0.0, predicted=np.where(right, "covid19", "normal"))
        found = calibration_metrics(table, seed, DRAWS)
        hits += found["ece_low"] <= error <= found["ece_high"]
    assert hits / REPETITIONS >= LEAST - 0.03  # some 90 % with an error of 0.1


def test_more_images_of_the_same_patients_add_no_certainty():
    once = draw_answers(np.random.default_rng(3), (0.8, 0.8))
    often = pd.concat([once] * 4, ignore_index=True)
    assert intervals(often, 0) == intervals(once, 0)
    strangers = often.assign(patient_id=often.index.astype(str))
    width = [x.high - x.low for x in (intervals(t, 0).uar for t in (often, strangers))]
    assert width[0] > 1.8 * width[1]


def test_values_are_the_metrics_and_row_order_does_not_matter():
    answers = make_system(make_manifest(10)).of("test")
    found = intervals(answers, 0)
    metrics = classification_metrics(answers["actual"], answers["predicted"])
    assert (found.uar.value, found.war.value) == pytest.approx((metrics["uar"], metrics["war"]))
    assert intervals(answers.sample(frac=1, random_state=1), 0) == found
    assert intervals(answers, 1) != found


def test_ten_patients_answered_right_are_not_certain():
    labelled = make_manifest(10, images=1)
    found = intervals(make_system(labelled, skill=50).of("test"), 0)
    assert found.recall["covid19"].value == 1
    assert found.recall["covid19"].low == pytest.approx(beta.ppf(0.025, 10.5, 0.5), abs=0.05)
    assert found.uar.low < 1


@pytest.mark.parametrize("label", ["covid19", "tuberculosis"])
def test_a_constant_answer_is_certain(label):
    answers = constant_system(make_manifest(10), label).of("test")
    found = intervals(answers, 0)
    assert found.recall[label] == Interval(1, 1, 1)
    assert (found.uar.low, found.uar.high) == pytest.approx((1 / 3, 1 / 3))
    on_ct = intervals(answers[answers["modality"] == "ct"], 0).uar
    assert (on_ct.low, on_ct.high) == ((0.5, 0.5) if label == "covid19" else (0, 0))


def test_a_perfect_auroc_is_uncertain_and_a_constant_score_is_not():
    truth = np.arange(20) < 10
    perfect = auroc(np.arange(20), truth, truth.astype(float), 0)
    assert perfect.high == 1
    assert 0.7 < perfect.low < 0.9
    assert auroc(np.arange(20), truth, np.full(20, 0.3), 0) == Interval(0.5, 0.5, 0.5)


def test_the_reliability_table_counts_every_image_once():
    answers = make_system(make_manifest(30)).of("test")
    bins = reliability(answers)
    assert bins["n"].sum() == len(answers)
    assert (bins["accuracy_low"] <= bins["accuracy"]).all()
    assert (bins["accuracy"] <= bins["accuracy_high"]).all()
    assert bins["confidence"].between(bins["low"], bins["high"]).all()
    # Wilson's limits of 8 of 10, as published in tables.
    assert wilson(np.array([0.8]), np.array([10])) == pytest.approx((0.4902, 0.9433), abs=1e-4)
