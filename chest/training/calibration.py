"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): confidences change, answers do not."""

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn

TEMPERATURES = (0.05, 20.0)  # bounds: without a mistake on validation the best one would be 0


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean cross-entropy of `logits`, (n, classes), and true classes, int (n,)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature, within TEMPERATURES, that maximizes the likelihood of `targets`."""
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), targets),
        bounds=np.log(TEMPERATURES),
        method="bounded",
        options={"xatol": 1e-9},  # so fine that machines agree on the digits that are written
    )
    return float(np.exp(found.x))


@torch.no_grad()
def divide_logits(head: nn.Linear, temperature: float) -> None:
    """Divide the logits that `head` computes, so that the model is saved calibrated."""
    for parameter in head.parameters():
        parameter /= temperature
