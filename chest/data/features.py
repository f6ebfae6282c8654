"""Features of frozen encoders: what `extract_features` writes and cheap classifiers read."""

import json
from pathlib import Path

import numpy as np

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY

FOLDER = Path("data/features")


def read_features(encoder: str, count: int) -> tuple[np.ndarray, dict]:
    """Read the features of all images, float64 (count, d), and how they were made.

    Raises InputError if a file is missing or holds anything else.
    """
    path, expected = FOLDER / f"{encoder}.npy", f"float32 of shape ({count}, d)"
    try:
        features = np.load(path)
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError([Problem(path, str(error), expected, REMEDY)]) from None
    if features.dtype != np.float32 or features.ndim != 2 or len(features) != count:
        found = f"{features.dtype} of shape {features.shape}"
        raise InputError([Problem(path, found, expected, REMEDY)])
    return features.astype(np.float64), description
