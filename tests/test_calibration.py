"""Calibration: temperature, expected calibration error, Brier score, reliability."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from chest.calibration import (
    calibration_metrics,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from chest.labels import LABELS

NAMES = np.array(LABELS, dtype=object)


def drawn(n, temperature=1.0, seed=0):
    """Logits of which softmax(logits / temperature) is the truth, and classes drawn from it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 3)) * temperature
    chances = softmax(logits / temperature, axis=1)
    return logits, np.array([rng.choice(3, p=p) for p in chances])


def test_the_likelihood_is_that_of_scikit_learn():
    logits, targets = drawn(200)
    expected = log_loss(targets, softmax(logits, axis=1), labels=[0, 1, 2])
    assert negative_log_likelihood(logits, targets) == pytest.approx(expected)
    # No overflow, and no logarithm of 0.
    assert negative_log_likelihood(np.array([[1e4, 0.0, 0.0]]), np.array([1])) == pytest.approx(1e4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_drawn_is_found(temperature):
    assert fit_temperature(*drawn(4000, temperature)) == pytest.approx(temperature, rel=0.1)


def test_a_split_without_mistakes_gives_a_temperature_all_the_same():
    assert 0.05 <= fit_temperature(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2])) < 0.1
    assert 19 < fit_temperature(np.eye(3)[[1, 2, 0]], np.array([0, 1, 2])) <= 20


def test_scaling_calibrates():
    logits, targets = drawn(3000, 3.0)
    actual = NAMES[targets]

    def error(t):
        probabilities = softmax(logits / t, axis=1)
        return calibration_metrics(probabilities, NAMES[logits.argmax(1)], actual)["ece"]

    assert error(1.0) > 0.1
    assert error(fit_temperature(logits, targets)) < 0.03


def test_brier_is_that_of_scikit_learn():
    logits, targets = drawn(300)
    probabilities = softmax(logits, axis=1)
    found = calibration_metrics(probabilities, NAMES[probabilities.argmax(1)], NAMES[targets])
    expected = brier_score_loss(targets, probabilities, labels=[0, 1, 2], scale_by_half=False)
    assert found["brier"] == pytest.approx(expected)


def test_the_error_by_hand():
    # Two bins: 0.9 sure and right in one of two, 0.6 sure and right in both.
    probabilities = np.array([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.4, 0.6, 0], [0.4, 0.6, 0]])
    predicted = NAMES[probabilities.argmax(1)]
    actual = NAMES[[0, 1, 1, 1]]
    bins = reliability(probabilities, predicted, actual)
    assert bins[["n", "accuracy"]].to_numpy().tolist() == [[2, 1.0], [2, 0.5]]
    assert bins["confidence"].tolist() == pytest.approx([0.6, 0.9])
    assert (bins["low"] < bins["confidence"]).all()
    assert (bins["confidence"] <= bins["high"]).all()
    found = calibration_metrics(probabilities, predicted, actual)["ece"]
    assert found == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


def test_certainty_and_no_answer_have_a_place():
    probabilities = np.array([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1.0, 0, 0]])
    predicted = np.array(["covid19", "unparsed", "covid19"], dtype=object)
    actual = NAMES[[0, 0, 0]]
    bins = reliability(probabilities, predicted, actual)
    assert bins["high"].tolist() == pytest.approx([1 / 3, 1.0])
    assert bins["accuracy"].tolist() == [0.0, 1.0]
    assert calibration_metrics(probabilities, predicted, actual)["ece"] == pytest.approx(1 / 9)
