"""Metrics of one system, computed from its answers."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from chest.core.labels import LABELS


def classification_metrics(actual: Sequence[str], predicted: Sequence[str]) -> dict:
    """Score `predicted` against `actual`, two sequences of class names of the same length.

    Returns a nested dict of floats from 0 to 1: ``uar`` (mean of the class recalls: balanced
    accuracy), ``war`` (accuracy), ``macro_precision``, ``macro_f1``, and ``recall``, ``precision``
    and ``f1`` of each class.

    The answer ``unparsed`` is wrong. The precision of a class that was never predicted is 0. A
    class that is not in `actual` has no recall and is left out of the dicts and means.
    """
    present = [label for label in LABELS if label in set(actual)]
    precision, recall, f1, _ = precision_recall_fscore_support(
        actual, predicted, labels=present, zero_division=0
    )
    return {
        "uar": float(np.mean(recall)),
        "war": float(accuracy_score(actual, predicted)),
        "macro_precision": float(np.mean(precision)),
        "macro_f1": float(np.mean(f1)),
        "recall": dict(zip(present, recall.tolist(), strict=True)),
        "precision": dict(zip(present, precision.tolist(), strict=True)),
        "f1": dict(zip(present, f1.tolist(), strict=True)),
    }


def rounded(metrics: dict, places: int = 4) -> dict:
    """Return nested `metrics` with every float rounded to `places`."""
    return {
        key: rounded(value, places) if isinstance(value, dict) else round(value, places)
        for key, value in metrics.items()
    }
