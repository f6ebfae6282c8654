"""Image classifiers of transformers: their head, their logits, saving and loading them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from chest.core.labels import LABELS
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.device import float_type, saving
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import Normalization, Transform, to_pixels, write_preprocessor

CLASSES = {"id2label": dict(enumerate(LABELS)), "label2id": {x: i for i, x in enumerate(LABELS)}}


@dataclass(frozen=True)
class ImageRows:
    """Rows to classify, int64 (n,), of `images`, with their normalization."""

    images: ImageStore
    rows: np.ndarray
    normalization: Normalization


def classify(
    accelerator: Accelerator,
    model: nn.Module,
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
    accelerator: Accelerator, model: nn.Module, data: ImageRows, batch_size: int
) -> np.ndarray:
    """Return the logits of the rows of `data` in evaluation mode, float64 (n, 3)."""
    model.eval()

    def function(rows: np.ndarray) -> torch.Tensor:
        images = data.images.take(rows)
        # A copy: the next batch may be written to the same place (CUDA graphs).
        return classify(accelerator, model, images, data.normalization).clone()

    answers = infer(accelerator, in_batches(data.rows, batch_size), function)
    return np.array([answers[row] for row in data.rows.tolist()])


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that computes the logits; in a ResNet it follows a Flatten."""
    head = model.classifier
    return head[-1] if isinstance(head, nn.Sequential) else head


def save_classifier(
    model: PreTrainedModel, normalization: Normalization, image_size: int, folder: Path
) -> None:
    """Write weights (safetensors), config and preprocessor, for ``from_pretrained``."""
    with saving(folder):
        model.save_pretrained(folder)
    write_preprocessor(folder, normalization, image_size)


def load_trained(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a classifier of any family that `save_classifier` wrote, for inference.

    Raises CheckpointError if it is no classifier of LABELS.
    """
    config = source.load(AutoConfig.from_pretrained)
    if config.id2label != CLASSES["id2label"]:
        raise source.error(f"it is no classifier of {', '.join(LABELS)}")
    model = source.load_model(AutoModelForImageClassification, config=config, dtype=dtype)
    return model.eval()
