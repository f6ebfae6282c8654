"""``data/annotations.csv`` and ``.json``: what a model wrote of each image."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table, write_json, write_table

PATH = Path("data/annotations.csv")
PLACES = 4  # of the log-likelihoods


def write_annotations(
    image_ids: pd.Series, findings: dict[str, np.ndarray], texts: Sequence[str], made: dict
) -> None:
    """Write a row for each image: the log-likelihood of each finding, and the description.

    `made` says how, for the JSON file beside it.
    """
    table = pd.DataFrame({"image_id": image_ids.to_numpy(), **findings, "text": texts})
    write_table(PATH, table, float_format=f"%.{PLACES}f")
    write_json(PATH.with_suffix(".json"), made)


def read_annotations(
    labelled: pd.DataFrame, findings: Sequence[str]
) -> tuple[np.ndarray, list[str], dict]:
    """Read the annotations of all images of the manifest `labelled`.

    Returns the log-likelihoods of `findings`, float64 (N, findings), the descriptions, and how they
    were made. Raises InputError if a file is missing, damaged or of other images.
    """
    table = read_table(PATH, ("image_id", *findings, "text"))
    values = table[list(findings)].apply(pd.to_numeric, errors="coerce")
    if [*table["image_id"]] != [*labelled["image_id"]] or not np.isfinite(values).all(axis=None):
        expected = "the images of data/manifest.csv, and numbers"
        raise InputError([Problem(PATH, "other images, or no numbers", expected, REMEDY)])
    made = json.loads(PATH.with_suffix(".json").read_text(encoding="utf-8"))
    return values.to_numpy(np.float64), table["text"].tolist(), made
