"""Answers per patient: the mean of the probabilities over a patient's images."""

import pandas as pd

from chest.core.labels import LABELS, UNPARSED
from chest.evaluation.predictions import PLACES

KEYS = ["split", "actual", "patient_id", "modality"]


def per_patient(answers: pd.DataFrame) -> pd.DataFrame:
    """Average one system's answers over the images of each patient, split, class and modality.

    `answers` is a table as of `predictions.System`; the result has its columns, so that all metrics
    apply to it, and ``images``, the number of images behind a row. A CT and an X-ray of the same
    person are two rows, for they are two examinations. ``image_id``, ``collection``, ``site`` and
    ``study`` are those of the first image. The prediction is the class of the largest mean,
    rounded; unparsed only if every image's was.
    """
    grouped = answers.sort_values("image_id").groupby(KEYS, sort=False)
    first = {name: (name, "first") for name in ("image_id", "collection", "site", "study")}
    means = {label: (label, "mean") for label in LABELS}
    parsed = ("predicted", lambda predicted: (predicted != UNPARSED).any())
    result = grouped.agg(**first, **means, parsed=parsed, images=("image_id", "size")).reset_index()
    result[list(LABELS)] = result[list(LABELS)].round(PLACES)
    best = result[list(LABELS)].idxmax(axis=1).astype(object)
    result["predicted"] = best.where(result["parsed"].astype(bool), UNPARSED)
    return result[[*answers.columns, "images"]].sort_values("image_id", ignore_index=True)
