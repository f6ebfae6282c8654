"""Answers per patient: the mean of the probabilities over a patient's images.

There is one unit per patient, modality and label within a split: nearly always one per patient.
"""

import pandas as pd

from chest.core.labels import LABELS, UNPARSED
from chest.evaluation.predictions import PLACES

KEYS = ["split", "actual", "patient_id", "modality"]


def per_patient(answers: pd.DataFrame) -> pd.DataFrame:
    """Average one system's answers over the images of each unit; see the module.

    `answers` is a table as of `predictions.System`; the result has its columns, so that all metrics
    apply to it, and ``images``, the number of images behind a row. ``image_id``, ``collection``,
    ``site`` and ``study`` are those of the first image. The prediction is the class of the largest
    mean, rounded; unparsed only if every image's was.
    """
    answers = answers.assign(parsed=answers["predicted"] != UNPARSED).sort_values("image_id")
    first = {name: (name, "first") for name in ("image_id", "collection", "site", "study")}
    means = {label: (label, "mean") for label in LABELS}
    counts = {"parsed": ("parsed", "any"), "images": ("image_id", "size")}
    result = answers.groupby(KEYS, sort=False).agg(**first, **means, **counts).reset_index()
    result[list(LABELS)] = result[list(LABELS)].round(PLACES)
    best = result[list(LABELS)].idxmax(axis=1).astype(object)
    result["predicted"] = best.where(result["parsed"], UNPARSED)
    return result[[*answers.columns.drop("parsed"), "images"]].sort_values(
        "image_id", ignore_index=True
    )
