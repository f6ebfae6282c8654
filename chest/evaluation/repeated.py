"""AUROC of a system that was trained several times: means over its runs, and paired differences.

As in `chest.evaluation.comparison`, patients and runs are drawn: a hierarchical bootstrap, with the
deviation of R drawn runs from their mean scaled by sqrt(R / (R - 1)).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from chest.evaluation.comparison import Difference, p_value
from chest.evaluation.intervals import DRAWS, Bootstrap, Interval, percentile_interval
from chest.evaluation.roc import auroc_draws, auroc_interval, disease_scores


def mean_auroc(
    runs: Sequence[pd.DataFrame], modality: str, seed: int, draws: int = DRAWS
) -> Interval:
    """Return the mean AUROC of the disease of `modality` over `runs`, with its 95 % interval.

    `runs` are the answers of each run to the same images, of both classes.
    """
    value, drawn, bootstrap = _mean_draws(runs, modality, seed, draws, stream=2)
    return auroc_interval(value, drawn, bootstrap)


def auroc_difference(
    first: Sequence[pd.DataFrame],
    second: Sequence[pd.DataFrame],
    modality: str,
    seed: int,
    draws: int = DRAWS,
) -> Difference:
    """Compare the mean AUROCs of two systems on the same images, the same patients drawn."""
    sides = (first, second)
    (a, before, _), (b, after, _) = (
        _mean_draws(runs, modality, seed, draws, stream=2 + k) for k, runs in enumerate(sides)
    )
    drawn = after - before
    return Difference(a, b, percentile_interval(b - a, drawn), p_value(drawn))


def _mean_draws(
    runs: Sequence[pd.DataFrame], modality: str, seed: int, draws: int, stream: int
) -> tuple[float, np.ndarray, Bootstrap]:
    """Return the mean AUROC, its draws, (draws,), and the patients that were drawn."""
    scored = [disease_scores(table.sort_values("image_id"), modality) for table in runs]
    rows, truth, _ = scored[0]
    bootstrap = Bootstrap(rows["patient_id"], truth, seed, draws)
    drawn = np.stack([auroc_draws(bootstrap, truth, score) for _, _, score in scored])
    value = float(np.mean([roc_auc_score(truth, score) for _, _, score in scored]))
    count, mean = len(drawn), drawn.mean(axis=0)
    if count > 1:
        rng = np.random.default_rng([seed, stream])
        chosen = rng.multinomial(count, np.full(count, 1 / count), draws) / count
        picked = np.einsum("dr,rd->d", chosen, drawn)
        mean = mean + np.sqrt(count / (count - 1)) * (picked - mean)
    return value, mean, bootstrap
