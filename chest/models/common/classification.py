"""Logits of a classifier: any module whose ``forward(pixel_values=...)`` returns ``logits``."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import Normalization, Transform, to_pixels


@dataclass(frozen=True)
class ImageRows:
    """Images to classify: `rows`, int64 (n,), of `images`, with their normalization."""

    images: ImageStore
    rows: np.ndarray
    normalization: Normalization


def classify(
    accelerator: Accelerator,
    model: torch.nn.Module,
    images: torch.Tensor,
    normalization: Normalization,
    transform: Transform | None = None,
) -> torch.Tensor:
    """Return the logits, (B, 3), that a classifier gives uint8 grey `images` (B, side, side).

    `transform` may change the images first, as in to_pixels.
    """
    dtype = float_type(accelerator)
    pixels = to_pixels(images, normalization, transform, dtype)
    with accelerator.autocast():
        return model(pixel_values=pixels).logits.to(dtype)


def classify_rows(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: ImageRows,
    batch_size: int,
    transform: Transform | None = None,
) -> np.ndarray:
    """Return the logits of the rows of `data` in evaluation mode, float64 (n, 3)."""
    model.eval()

    def function(rows: np.ndarray) -> torch.Tensor:
        images = data.images.take(rows)
        # A copy: the next batch may be written to the same place (CUDA graphs).
        return classify(accelerator, model, images, data.normalization, transform).clone()

    answers = infer(accelerator, in_batches(data.rows, batch_size), function)
    return np.array([answers[row] for row in data.rows.tolist()])
