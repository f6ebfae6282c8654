"""Calibration: whether answers of 90 % confidence are right 90 % of the time."""

import numpy as np
import pandas as pd
from scipy.stats import norm

from chest.core.labels import LABELS
from chest.evaluation.intervals import DRAWS, LEVEL, Bootstrap, Interval, percentile_interval

BINS = 15


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """Return how often answers of a given confidence are right, one row per non-empty bin.

    `table` holds one system's answers (see `predictions.System`). The confidence is the largest
    probability; an ``unparsed`` answer is wrong at a confidence of 1/3. There are 15 bins of equal
    width from 0 to 1. Columns: low, high (edges), n (images), patients, confidence (mean),
    accuracy, accuracy_low, accuracy_high (Wilson's interval, with the number of patients).
    """
    values = table[list(LABELS)].to_numpy()
    rows = pd.DataFrame(
        {
            "bin": _bins(values),
            "confidence": values.max(axis=1),
            "accuracy": (table["actual"] == table["predicted"]).to_numpy(),
            "patient_id": table["patient_id"].to_numpy(),
        }
    )
    result = rows.groupby("bin").agg(
        low=("bin", lambda own: own.iloc[0] / BINS),
        high=("bin", lambda own: (own.iloc[0] + 1) / BINS),
        n=("confidence", "size"),
        patients=("patient_id", "nunique"),
        confidence=("confidence", "mean"),
        accuracy=("accuracy", "mean"),
    )
    low, high = wilson(result["accuracy"].to_numpy(), result["patients"].to_numpy())
    result = result.assign(accuracy_low=low, accuracy_high=high)
    return result.reset_index(drop=True)


def wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the limits of Wilson's 95 % interval of shares of `n` (Wilson 1927)."""
    z2 = norm.ppf((1 + LEVEL) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def calibration_metrics(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> dict[str, float]:
    """Return ``ece`` and ``brier`` of one system's answers, each with ``_low`` and ``_high``.

    ``ece`` is the expected calibration error, from 0 to 1: the mean distance of confidence and
    accuracy over the bins of `reliability`, weighted by images (Naeini et al. 2015). ``brier`` is
    the mean squared distance of the probabilities from the truth, summed over the classes: from 0
    to 2 (Brier 1950).
    """
    values = table[list(LABELS)].to_numpy()
    right = (table["actual"] == table["predicted"]).to_numpy()
    truth = table["actual"].to_numpy()[:, None] == np.array(LABELS, dtype=object)
    gaps = np.eye(BINS)[_bins(values)] * (values.max(axis=1) - right)[:, None]
    squares = ((values - truth) ** 2).sum(axis=1, keepdims=True)

    bootstrap = Bootstrap(table["patient_id"], table["actual"], seed, draws)
    sums = bootstrap.image_sums(np.hstack([gaps, squares, np.ones((len(table), 1))]))
    means = sums[:, :-1] / sums[:, -1:]
    ece = _ece_interval(gaps.mean(axis=0), means[:, :BINS])
    brier = percentile_interval(float(squares.mean()), means[:, BINS])
    return ece.as_dict("ece") | brier.as_dict("brier")


def _ece_interval(gaps: np.ndarray, drawn: np.ndarray) -> Interval:
    """Return the ECE and its interval, by inverting a test.

    `gaps`, (BINS,), are the bins' shares of the images times confidence minus accuracy; `drawn` the
    same in each draw, (draws, BINS). Noise adds to a sum of distances: a perfectly calibrated
    system has an ECE above 0, and percentiles of the draws lie higher still. So the limits are the
    errors c times as large as the found one for which the found one is not extreme.
    """
    value, noise = float(np.abs(gaps).sum()), drawn - gaps
    factors = np.linspace(0, 3, 121)
    seen = np.stack([np.abs(c * gaps + noise).sum(axis=1) for c in factors])
    low, high = np.quantile(seen, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    possible = value * factors[(low <= value) & (value <= high)]
    return Interval(value, *(float(f(possible, initial=value)) for f in (np.min, np.max)))


def _bins(values: np.ndarray) -> np.ndarray:
    """Return the bin of each row, int64, (n,); an edge belongs to the bin below it."""
    return np.clip(np.ceil(values.max(axis=1) * BINS) - 1, 0, BINS - 1).astype(np.int64)
