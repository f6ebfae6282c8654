"""The interface of a loaded system, trained or zero-shot, for tools that classify new images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Probabilities = list[list[float] | None]  # in the order of LABELS; None if no class is named


@dataclass(frozen=True)
class Predictor:
    """A system that is ready to classify images.

    ``image_size``: side of the images that it reads, in px.
    ``needs_modality``: whether it must be told if an image is CT or X-ray.
    ``classify(images, rows, modalities)``: the probabilities of `rows`, int64 (n,), of uint8
    `images`, (N, side, side), with the modality of each row.
    ``describe(n)``: the fields of a predictions record of n answers.
    ``explain(images, classes)``: the relevance of each patch of uint8 `images`, (B, side, side),
    for `classes`, int (B,), as float32 (B, rows, columns); None for a system without explanations.
    ``slices``: position and normalization of the CT slices that it was trained on; None for a
    zero-shot system, which takes those of params.yaml.
    """

    image_size: int
    needs_modality: bool
    classify: Callable[[np.ndarray, np.ndarray, Sequence[str]], Probabilities]
    describe: Callable[[int], dict]
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    slices: dict[str, str | float] | None = None
