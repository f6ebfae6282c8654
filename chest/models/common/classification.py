"""Image classifiers of transformers: their heads, their logits and features, saving them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from chest.core.labels import DISEASES, LABELS, MODALITIES
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.device import float_type, saving
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import Normalization, to_pixels, write_preprocessor

# shared: one head for the three classes. masked: the same, but the class that does not occur in an
# image's modality gets probability 0 at inference. by_modality: a head for each modality.
Head = Literal["shared", "masked", "by_modality"]
POSSIBLE = [
    [label in ("normal", DISEASES[modality]) for label in LABELS] for modality in MODALITIES
]
# The outputs of heads by modality, as (modality, label).
PAIRS = [
    (m, x)
    for m, row in zip(MODALITIES, POSSIBLE, strict=True)
    for x, possible in zip(LABELS, row, strict=True)
    if possible
]
# Which output is the logit of a class in a modality; 0 stands for a class that is not possible.
OUTPUTS = [[PAIRS.index((m, x)) if (m, x) in PAIRS else 0 for x in LABELS] for m in MODALITIES]


def head_labels(head: Head) -> dict:
    """Return the fields of a model's configuration that name its outputs."""
    names = [" ".join(pair) for pair in PAIRS] if head == "by_modality" else LABELS
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "head": head,
    }


@dataclass(frozen=True)
class ImageRows:
    """Rows to classify, int64 (n,), of `images`, with their normalization.

    ``modalities``: the position in MODALITIES of each of `images`, int64 (N,); None for a shared
    head, which does not need it.
    """

    images: ImageStore
    rows: np.ndarray
    normalization: Normalization
    modalities: np.ndarray | None = None


def class_logits(
    outputs: torch.Tensor, head: Head, modalities: torch.Tensor | None
) -> torch.Tensor:
    """Return the logits of LABELS, (B, 3), from a model's `outputs`, (B, 3) or (B, 4).

    `modalities`, int64 (B,), are positions in MODALITIES. Unless the head is shared, the class that
    is not possible in a modality gets minus infinity.
    """
    if head == "shared":
        return outputs
    possible, columns = _by_modality(outputs.device)
    if head == "by_modality":
        outputs = outputs.gather(1, columns[modalities])
    return outputs.masked_fill(~possible[modalities], -torch.inf)


@cache
def _by_modality(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return POSSIBLE and OUTPUTS on `device`; cached, since each copy waits for the device."""
    with torch.inference_mode(False):
        return torch.tensor(POSSIBLE, device=device), torch.tensor(OUTPUTS, device=device)


def classify_rows(
    accelerator: Accelerator, model: PreTrainedModel, data: ImageRows, batch_size: int
) -> np.ndarray:
    """Return the logits of the rows of `data` in evaluation mode, float64 (n, 3)."""
    model.eval()
    dtype, head = float_type(accelerator), model.config.head

    def function(rows: np.ndarray) -> torch.Tensor:
        pixels = to_pixels(data.images.take(rows), data.normalization, dtype=dtype)
        with accelerator.autocast():
            outputs = model(pixel_values=pixels).logits.to(dtype)
        modalities = None
        if head != "shared":
            modalities = torch.from_numpy(data.modalities[rows]).to(outputs.device)
        # A copy: the next batch may be written to the same place (CUDA graphs).
        return class_logits(outputs, head, modalities).clone()

    answers = infer(accelerator, in_batches(data.rows, batch_size), function)
    return np.array([answers[row] for row in data.rows.tolist()], dtype=np.float64)


def logits_and_features(
    model: PreTrainedModel, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of `model` for `pixels`, and the input of its head, (B, d)."""
    kept: list[torch.Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        return model(pixel_values=pixels).logits, kept[0]
    finally:
        hook.remove()


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
