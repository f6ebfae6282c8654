"""UAR, WAR and the rest, against numbers by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, classification_report

from chest.labels import LABELS
from chest.metrics import MetricsError, classification_metrics, rounded


def test_a_case_by_hand():
    # COVID-19 3 of 4, normal 1 of 2, tuberculosis 0 of 1 and never answered.
    actual = ["covid19"] * 4 + ["normal"] * 2 + ["tuberculosis"]
    predicted = ["covid19"] * 3 + ["normal"] * 2 + ["covid19"] + ["normal"]
    metrics = classification_metrics(actual, predicted)
    assert metrics["recall"] == {"covid19": 0.75, "normal": 0.5, "tuberculosis": 0.0}
    assert metrics["precision"] == {"covid19": 0.75, "normal": 1 / 3, "tuberculosis": 0.0}
    assert metrics["uar"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert metrics["war"] == pytest.approx(4 / 7)
    assert metrics["macro_precision"] == pytest.approx((0.75 + 1 / 3 + 0) / 3)
    f1 = {"covid19": 0.75, "normal": 2 * (1 / 3) * 0.5 / (1 / 3 + 0.5), "tuberculosis": 0.0}
    assert metrics["f1"] == pytest.approx(f1)
    assert metrics["macro_f1"] == pytest.approx(sum(f1.values()) / 3)


def test_it_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    actual, predicted = rng.choice(LABELS, (2, 500), p=[0.6, 0.35, 0.05])
    metrics = classification_metrics(actual, predicted)
    report = classification_report(actual, predicted, output_dict=True, zero_division=0)
    assert metrics["uar"] == pytest.approx(balanced_accuracy_score(actual, predicted))
    assert metrics["war"] == pytest.approx(accuracy_score(actual, predicted))
    assert metrics["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    for label in LABELS:
        assert metrics["precision"][label] == pytest.approx(report[label]["precision"])
        assert metrics["f1"][label] == pytest.approx(report[label]["f1-score"])


def test_an_answer_to_all_has_a_uar_of_a_third():
    assert classification_metrics(LABELS, ["normal"] * 3)["uar"] == pytest.approx(1 / 3)


def test_unparsed_answers_are_wrong_and_not_dropped():
    metrics = classification_metrics(["normal"] * 4, ["normal"] * 2 + ["unparsed"] * 2)
    assert metrics["war"] == metrics["recall"]["normal"] == 0.5
    assert metrics["precision"]["normal"] == 1.0


def test_a_class_that_does_not_occur_is_left_out():
    metrics = classification_metrics(["covid19", "normal"], ["covid19", "tuberculosis"])
    assert set(metrics["recall"]) == {"covid19", "normal"}
    assert metrics["uar"] == 0.5


@pytest.mark.parametrize(
    ("actual", "predicted", "told"),
    [
        (["normal"], [], "1 actual classes, but 0"),
        ([], [], "no answers"),
        (["sick"], ["normal"], "'sick'"),
        (["unparsed"], ["normal"], "actual: 'unparsed'"),
        (["normal"], ["Normal"], "'Normal'"),
        ([None], ["normal"], "None"),
    ],
)
def test_what_cannot_be_scored_is_refused(actual, predicted, told):
    with pytest.raises(MetricsError, match=told):
        classification_metrics(actual, predicted)


def test_rounding_reaches_every_level():
    assert rounded({"a": 1 / 3, "b": {"c": 2 / 3}}) == {"a": 0.3333, "b": {"c": 0.6667}}
