"""AUROC against scikit-learn; thresholds come from validation alone."""

import numpy as np
import pytest
from made import make_manifest, make_system
from sklearn.metrics import roc_auc_score

from chest.evaluation import roc
from chest.evaluation.intervals import Bootstrap

LABELLED = make_manifest(40)
SYSTEM = make_system(LABELLED, skill=2)


def test_aurocs_are_those_of_scikit_learn():
    test = SYSTEM.of("test")
    found = roc.roc_metrics(test, 0)
    assert found["auroc"]["normal"] == roc_auc_score(test["actual"] == "normal", test["normal"])
    on_ct = test[test["modality"] == "ct"]
    expected = roc_auc_score(on_ct["actual"] == "covid19", on_ct["covid19"])
    assert found["auroc_within"]["ct"] == pytest.approx(expected)
    assert found["auroc_within_low"]["ct"] < expected < found["auroc_within_high"]["ct"]


def test_each_draw_is_the_weighted_auroc_with_ties():
    rng = np.random.default_rng(0)
    truth, score = np.arange(30) < 14, rng.integers(0, 5, 30) / 4
    bootstrap = Bootstrap(np.arange(30) // 2, truth, 0, 1000)
    drawn = roc.auroc_draws(bootstrap, truth, score)
    for k in (0, 500, 999):
        weight = bootstrap.weights[k][bootstrap.patient]
        assert drawn[k] == pytest.approx(roc_auc_score(truth, score, sample_weight=weight))


def test_thresholds_reach_their_target_on_validation():
    chosen = roc.thresholds(SYSTEM.of("val"))
    assert {*chosen} == {"ct", "xray"}
    points = roc.operating_points(SYSTEM.of("val"), chosen, 0)
    for row in points:
        named, wanted = row["target"].split("_")
        assert row[named] >= int(wanted) / 100
        # Chosen on these very images, they are the best.
        assert row["specificity" if named == "sensitivity" else "sensitivity"] == row["best"]


def test_test_images_are_judged_at_the_thresholds_of_validation():
    chosen = roc.thresholds(SYSTEM.of("val"))
    test = SYSTEM.of("test")
    row = roc.operating_points(test, chosen, 0)[0]
    assert (row["modality"], row["target"]) == ("ct", "sensitivity_90")
    _, truth, score = roc.disease_scores(test, "ct")
    assert row["threshold"] == chosen["ct"]["sensitivity_90"]
    assert row["sensitivity"] == (score >= row["threshold"])[truth].mean()
    assert row["specificity"] == (score < row["threshold"])[~truth].mean()
    assert row["sensitivity_low"] < row["sensitivity"] < row["sensitivity_high"]
    assert (row["diseased"], row["normal"]) == (80, 80)
    # Answers shifted on the test images alone move the figures, not the threshold.
    shifted = test.assign(covid19=test["covid19"] ** 3)
    moved = roc.operating_points(shifted, chosen, 0)[0]
    assert moved["sensitivity"] < row["sensitivity"]


def test_a_modality_of_one_class_has_no_threshold_and_no_auroc():
    only = SYSTEM.of("val").query("modality == 'xray' or actual == 'normal'")
    assert {*roc.thresholds(only)} == {"xray"}
    assert {*roc.roc_metrics(only, 0)["auroc_within"]} == {"xray"}
