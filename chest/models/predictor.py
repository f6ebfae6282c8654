"""A loaded system behind one interface, whatever its kind: for tools that answer new images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Probabilities = list[list[float] | None]  # in the order of LABELS; None: names no class


@dataclass(frozen=True)
class Predictor:
    """A system that is ready to answer.

    ``image_size``: side of the images that it reads, in px.
    ``needs_modality``: whether it must be told if an image is CT or X-ray.
    ``classify(images, rows, modalities)``: the answers to `rows`, int64 (n,), of uint8 `images`,
    (N, side, side), with the modality of each row.
    ``describe(n)``: the fields of a predictions record of n answers.
    ``explain(images, classes)``: what the score of `classes`, int (B,), depends on in uint8
    `images`, (B, side, side), as float32 (B, rows, columns) of patches; None if it cannot tell.
    """

    image_size: int
    needs_modality: bool
    classify: Callable[[np.ndarray, np.ndarray, Sequence[str]], Probabilities]
    describe: Callable[[int], dict]
    explain: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
