"""Shortcut probes: what a simple model learns from a part of the image alone.

A linear model is trained and tested on images of which only a region is visible, pooled to
28 x 28 pixels. If it beats the blind rules with the lungs hidden, something outside the lungs tells
the class, and a network may use it. (A network that was trained on whole images says little when
it is shown a part: what it answers to blackened lungs is arbitrary.) After Maguolo and Nanni,
"A critic evaluation of methods for COVID-19 automatic detection from X-ray images" (2020,
arXiv:2004.12823).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from chest.data.regions import VISIBLE, VISIBLE_NAMES, visible_region
from chest.evaluation.baselines import Fitted, fit_linear, pool
from chest.evaluation.predictions import System, read_system

FOLDER = Path("data/probes")  # in the format of data/predictions, but no systems


def fit_probes(images: np.ndarray, labelled: pd.DataFrame) -> dict[str, Fitted]:
    """Fit a linear model on each region of VISIBLE and answer all images with it.

    `images` is uint8, (N, side, side), one per row of `labelled`. A rectangle stands for the lungs.
    """
    regions = {name: visible_region(name, images.shape[-1]) for name in VISIBLE}
    return {name: fit_linear(pool(images, region), labelled) for name, region in regions.items()}


def read_probes(labelled: pd.DataFrame) -> dict[str, System]:
    """Read the answers of all probes; see `predictions.read_system`."""
    return {name: read_system(name, labelled, FOLDER) for name in VISIBLE}


def probe_name(region: str) -> str:
    """Return the display name of the probe of a region."""
    return f"Linear probe: {VISIBLE_NAMES[region].lower()}"
