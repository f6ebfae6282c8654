"""Whether probabilities mean what they say: temperature, calibration error, Brier score."""

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from chest.labels import LABELS

TEMPERATURES = (0.05, 20.0)  # a split that is told apart without a mistake would give 0
BINS = 15


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy of `logits`, (n, classes), with the true classes `targets`, int (n,)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature by which dividing `logits` gives `targets` the greatest likelihood.

    Between 0.05 and 20. It changes no answer, only how sure it is (Guo et al. 2017,
    arXiv:1706.04599).
    """
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), targets),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
    )
    return float(np.exp(found.x))


def reliability(
    probabilities: np.ndarray, predicted: np.ndarray, actual: np.ndarray
) -> pd.DataFrame:
    """How often answers of a given confidence are right: a DataFrame, a row for each filled bin.

    `probabilities` is (n, 3); `predicted` and `actual` are class names, (n,). The confidence is the
    largest probability; an ``unparsed`` answer is wrong at the confidence of its equal shares. Bins
    are 15 of equal width from 0 to 1. Columns: low, high (the bin's edges), n, confidence (mean),
    accuracy.
    """
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": predicted == actual})
    grouped = table.groupby("bin").agg(
        n=("confidence", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    edges = pd.DataFrame({"low": grouped.index / BINS, "high": (grouped.index + 1) / BINS})
    return pd.concat([edges, grouped.reset_index(drop=True)], axis=1)


def calibration_metrics(
    probabilities: np.ndarray, predicted: np.ndarray, actual: np.ndarray
) -> dict[str, float]:
    """``ece`` and ``brier``, floats; the arguments are those of `reliability`.

    ``ece``: expected calibration error, from 0 to 1, the mean distance of confidence and accuracy
    over the bins of `reliability`, weighted by their images (Naeini et al. 2015). ``brier``: the
    mean over the images of the summed squared distance of the probabilities from 1 for the true
    class and 0 for the others, from 0 to 2 (Brier 1950).
    """
    bins = reliability(probabilities, predicted, actual)
    gap = (bins["confidence"] - bins["accuracy"]).abs()
    truth = np.asarray(actual)[:, None] == np.array(LABELS)
    return {
        "ece": float((gap * bins["n"]).sum() / bins["n"].sum()),
        "brier": float(((probabilities - truth) ** 2).sum(axis=1).mean()),
    }
