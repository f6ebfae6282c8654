"""Metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, classification_report

from chest.core.labels import LABELS, UNPARSED
from chest.evaluation.metrics import classification_metrics, rounded


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    actual, predicted = rng.choice(LABELS, 300), rng.choice(LABELS, 300)
    found = classification_metrics(actual, predicted)
    report = classification_report(actual, predicted, output_dict=True)
    assert found["uar"] == pytest.approx(balanced_accuracy_score(actual, predicted))
    assert found["war"] == pytest.approx(accuracy_score(actual, predicted))
    assert found["macro_precision"] == pytest.approx(report["macro avg"]["precision"])
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    for label in LABELS:
        assert found["recall"][label] == pytest.approx(report[label]["recall"])
        assert found["precision"][label] == pytest.approx(report[label]["precision"])
        assert found["f1"][label] == pytest.approx(report[label]["f1-score"])


def test_unparsed_is_wrong_and_an_absent_class_has_no_recall():
    found = classification_metrics(
        ["covid19", "covid19", "normal"], ["covid19", UNPARSED, "normal"]
    )
    assert found["recall"] == {"covid19": 0.5, "normal": 1.0}
    assert found["uar"] == 0.75
    assert found["war"] == pytest.approx(2 / 3)


def test_rounding_reaches_nested_values():
    assert rounded({"a": {"b": 0.123456}, "c": 1.0}) == {"a": {"b": 0.1235}, "c": 1.0}
