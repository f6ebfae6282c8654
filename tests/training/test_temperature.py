"""Temperature scaling."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss

from chest.training.calibration import divide_logits, fit_temperature, negative_log_likelihood


def draw(n, temperature=1.0):
    """Draw logits of which softmax(logits / temperature) is the truth, and the true classes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (n, 3)) * temperature
    return logits, np.array([rng.choice(3, p=p) for p in softmax(logits / temperature, axis=1)])


def test_the_likelihood_is_that_of_scikit_learn():
    logits, targets = draw(200)
    expected = log_loss(targets, softmax(logits, axis=1), labels=[0, 1, 2])
    assert negative_log_likelihood(logits, targets) == pytest.approx(expected)
    assert negative_log_likelihood(np.array([[1e4, 0.0, 0.0]]), np.array([1])) == pytest.approx(1e4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_drawn_is_found_and_lowers_the_loss(temperature):
    logits, targets = draw(4000, temperature)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.1)
    for other in (0.98 * found, 1.02 * found):
        assert negative_log_likelihood(logits / found, targets) < negative_log_likelihood(
            logits / other, targets
        )


def test_noise_does_not_move_the_temperature():
    logits, targets = draw(300, 2.0)
    noisy = logits + np.random.default_rng(1).normal(0, 1e-9, logits.shape)
    assert fit_temperature(noisy, targets) == pytest.approx(fit_temperature(logits, targets), 1e-7)


def test_a_split_without_mistakes_gives_a_temperature_all_the_same():
    assert 0.05 <= fit_temperature(np.eye(3), np.arange(3)) < 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_carries_the_temperature(bias):
    head, features = torch.nn.Linear(4, 3, bias), torch.randn(2, 4)
    before = head(features)
    divide_logits(head, 2.5)
    torch.testing.assert_close(head(features), before / 2.5)
