"""From packed grey images to the normalized input of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers.image_processing_base import ImageProcessingMixin

from chest.core.errors import ParameterError
from chest.models.common.checkpoints import Source

Transform = Callable[[torch.Tensor], torch.Tensor]  # of grey values from 0 to 1, (B, 1, side, side)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of grey values from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_normalization(source: Source) -> Normalization:
    """Load the checkpoint's own normalization from its preprocessor_config.json.

    Raises CheckpointError if the file is missing or holds no three means and deviations.
    """
    part = "preprocessor_config.json"
    content, _ = source.load(ImageProcessingMixin.get_image_processor_dict, part)
    with source.reading(part):
        mean, std = (tuple(map(float, content[key])) for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise source.error(f"its {part} has image_mean {mean} and image_std {std}")
    return Normalization(mean, std)


def to_pixels(
    grey: torch.Tensor,
    normalization: Normalization,
    transform: Transform | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalize uint8 grey images (B, side, side); returns `dtype` (B, 3, side, side).

    The grey channel stands for all three. `transform` changes the images before normalization; it
    gets and returns values from 0 to 1, (B, 1, side, side).
    """
    images = grey.to(dtype)[:, None] / 255
    if transform is not None:
        images = transform(images)
    mean, std = _on_device(normalization, grey.device, dtype)
    return (images - mean) / std


@cache
def _on_device(
    normalization: Normalization, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation, (1, 3, 1, 1), copied to the device once: each copy is a wait."""
    with torch.inference_mode(False):
        return tuple(
            torch.tensor(values, device=device, dtype=dtype).view(1, 3, 1, 1)
            for values in (normalization.mean, normalization.std)
        )


def check_image_size(config_size: int, image_size: int) -> None:
    """Raise ParameterError unless the checkpoint reads images of `image_size` px."""
    if config_size != image_size:
        raise ParameterError(
            f"image_size: {image_size}, but the checkpoint reads images of {config_size} px"
        )
