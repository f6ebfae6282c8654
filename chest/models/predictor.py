"""The interface of a loaded system, trained or zero-shot, for tools that classify new images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Probabilities = Sequence[Sequence[float] | None]  # in the order of LABELS; None: no class is named


@dataclass(frozen=True)
class Shown:
    """New images through a model's view, with the lungs that were found in them.

    ``images``: uint8 (n, side, side), as the model sees them. ``masks``: bool, the same shape, the
    lungs in them. ``accepted``: bool (n,), whether the mask can be that of two lungs. ``answered``:
    bool (n,), whether the model answers the image.
    """

    images: np.ndarray
    masks: np.ndarray
    accepted: np.ndarray
    answered: np.ndarray


@dataclass(frozen=True)
class Predictor:
    """A system that is ready to classify images.

    ``image_size``: side of the images that it reads, in px.
    ``needs_modality``: whether it must be told if an image is CT or X-ray.
    ``show(images, modalities)``: what its view shows of uint8 `images`, (n, side, side), to be
    classified instead of them; None for a system that sees them as they are.
    ``classify(images, rows, modalities)``: the probabilities of `rows`, int64 (n,), of uint8
    `images`, (N, side, side), with the modality of each row.
    ``describe(n)``: the fields of a predictions record of n answers.
    ``explain(images, classes, modalities)``: the relevance of each patch of uint8 `images`,
    (B, side, side), for `classes`, int (B,), as float32 (B, rows, columns); None for a system
    without explanations.
    ``slices``: position and normalization of the CT slices that it was trained on; None for a
    zero-shot system, which takes those of params.yaml.
    """

    image_size: int
    needs_modality: bool
    classify: Callable[[np.ndarray, np.ndarray, Sequence[str]], Probabilities]
    describe: Callable[[int], dict]
    explain: Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray] | None = None
    show: Callable[[np.ndarray, Sequence[str]], Shown] | None = None
    slices: dict[str, str | float] | None = None
