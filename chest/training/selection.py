"""Validation figures, and the epoch that they select."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chest.core.labels import MODALITIES
from chest.evaluation.metrics import classification_metrics

DECIMALS = 6  # figures are rounded before they are compared, so that noise decides nothing


def validation_figures(table: pd.DataFrame, predicted: np.ndarray) -> dict[str, float]:
    """Return val_uar, val_war, val_within and val_worst of `predicted` class names, (n,).

    `table` has the columns label and modality. val_within is the mean of the UARs within CT and
    within X-ray, without a modality of one class (val_uar if both have one class); val_worst is the
    lowest class recall.
    """
    actual, modality = table["label"].to_numpy(), table["modality"].to_numpy()
    metrics = classification_metrics(actual, predicted)
    within = [
        classification_metrics(actual[rows], predicted[rows])["uar"]
        for rows in (modality == name for name in MODALITIES)
        if len(set(actual[rows])) > 1
    ]
    return {
        "val_uar": metrics["uar"],
        "val_war": metrics["war"],
        "val_within": float(np.mean(within or metrics["uar"])),
        "val_worst": min(metrics["recall"].values()),
    }


def best_epoch(curve: Sequence[dict], select_by: str) -> int:
    """Return the epoch with the highest ``val_<select_by>``.

    Ties go to the lowest validation loss, then to the earliest epoch.
    """

    def figures(row: dict) -> tuple[float, float]:
        return round(row[f"val_{select_by}"], DECIMALS), -round(row["val_loss"], DECIMALS)

    return max(curve, key=figures)["epoch"]
