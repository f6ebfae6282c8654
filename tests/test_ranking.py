"""Ranking: AUROC, within modality too, and the operating points of a triage test."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from chest.labels import LABELS
from chest.ranking import disease_scores, operating_points, ranking_metrics


def answers(actual, modality, probabilities):
    table = pd.DataFrame(np.asarray(probabilities, float), columns=list(LABELS))
    return table.assign(actual=actual, modality=modality)


def mixed(n=200, seed=0):
    rng = np.random.default_rng(seed)
    kinds = [("covid19", "ct"), ("normal", "ct"), ("normal", "xray"), ("tuberculosis", "xray")]
    actual, modality = zip(*(kinds[i] for i in rng.integers(4, size=n)), strict=True)
    lean = np.eye(3)[[LABELS.index(label) for label in actual]]
    raw = rng.dirichlet([1, 1, 1], n) + 0.3 * lean
    return answers(list(actual), list(modality), raw / raw.sum(1, keepdims=True))


def test_each_class_against_the_others():
    table = mixed()
    found = ranking_metrics(table)["auroc"]
    for label in LABELS:
        assert found[label] == roc_auc_score(table["actual"] == label, table[label])


def test_within_a_modality_the_third_class_is_taken_out():
    table = mixed()
    found = ranking_metrics(table)["auroc_within"]
    xrays = table[table["modality"] == "xray"]
    share = xrays["tuberculosis"] / (xrays["tuberculosis"] + xrays["normal"])
    assert found["xray"] == roc_auc_score(xrays["actual"] == "tuberculosis", share)
    # However much goes to COVID-19, which no X-ray shows, the order is the same.
    other = table.copy()
    other[["normal", "tuberculosis"]] *= 0.01
    other["covid19"] = 1 - other["normal"] - other["tuberculosis"]
    assert ranking_metrics(other)["auroc_within"]["xray"] == pytest.approx(found["xray"])


def test_a_floor_that_says_the_same_of_all_ranks_nothing():
    table = mixed().assign(covid19=0.5, normal=0.3, tuberculosis=0.2)
    found = ranking_metrics(table)
    assert set(found["auroc"].values()) == set(found["auroc_within"].values()) == {0.5}
    # Thresholds that all images pass, or none.
    assert found["triage"] == {
        "sensitivity_at_specificity_70": 0.0, "specificity_at_sensitivity_90": 0.0,
    }  # fmt: skip


def test_no_probability_for_either_class_is_one_half():
    table = answers(["covid19", "normal"], "ct", [[0, 0, 1], [0, 1, 0]])
    truth, score = disease_scores(table, "ct")
    assert truth.tolist() == [True, False]
    assert score.tolist() == [0.5, 0.0]


def test_operating_points_by_hand():
    truth = np.array([True] * 10 + [False] * 10)
    # Ten sick at 95, 85 … 5, ten healthy at 50, 45 … 5.
    found = operating_points(truth, np.concatenate([np.arange(95, 0, -10), np.arange(50, 0, -5)]))
    # Three of ten healthy may be called sick: those at 50, 45 and 40; the next sick is at 45.
    assert found["sensitivity_at_specificity_70"] == 0.6
    # Nine of ten sick must be called so: the threshold is 15, which takes eight of ten healthy.
    assert found["specificity_at_sensitivity_90"] == pytest.approx(0.2)
    perfect = operating_points(truth, truth.astype(float))
    assert set(perfect.values()) == {1.0}


def test_what_needs_two_classes_is_left_out_where_there_is_one():
    lone = answers(["covid19"] * 3, "ct", [[0.5, 0.3, 0.2]] * 3)
    assert ranking_metrics(lone) == {}
    two = answers(["covid19", "normal"], "ct", [[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]])
    found = ranking_metrics(two)
    assert set(found["auroc"]) == {"covid19", "normal"}
    assert found["auroc_within"] == {"ct": 1.0}
    assert "triage" not in found
