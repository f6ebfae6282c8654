"""Which epoch is kept: figures on the validation split, and the best of them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chest.core.labels import MODALITIES
from chest.evaluation.metrics import classification_metrics

PLACES = 6  # figures are rounded before they are compared: noise must not choose another epoch


def validation_figures(table: pd.DataFrame, predicted: np.ndarray) -> dict[str, float]:
    """Return val_uar, val_war, val_within and val_worst of `predicted` class names, (n,).

    `table` has the columns label and modality. val_within is the mean of the UARs within CT and
    within X-ray, of those that have two classes (val_uar if neither has), val_worst the lowest
    class recall.
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

    Among equals it is the one with the lowest validation loss, then the earliest.
    """

    def figures(row: dict) -> tuple[float, float]:
        return round(row[f"val_{select_by}"], PLACES), -round(row["val_loss"], PLACES)

    return max(curve, key=figures)["epoch"]
