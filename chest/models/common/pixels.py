"""From packed grey images to the normalized input of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers.image_processing_base import ImageProcessingMixin

from chest.core.errors import ParameterError
from chest.core.files import write_json
from chest.models.common.checkpoints import Source

PREPROCESSOR = "preprocessor_config.json"
Transform = Callable[[torch.Tensor], torch.Tensor]  # of grey values from 0 to 1, (B, 1, side, side)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of grey values from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_normalization(source: Source) -> Normalization:
    """Load the checkpoint's own normalization from its preprocessor_config.json.

    Raises CheckpointError unless the file holds three means and three positive deviations.
    """
    content = source.load_dict(ImageProcessingMixin.get_image_processor_dict, PREPROCESSOR)
    with source.reading(PREPROCESSOR, TypeError):
        mean, std = (tuple(map(float, content[key])) for key in ("image_mean", "image_std"))
        if divides_twice(content):
            std = tuple(value * value for value in std)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise source.error(f"its {PREPROCESSOR} has image_mean {mean} and image_std {std}")
    return Normalization(mean, std)


def divides_twice(preprocessor: dict) -> bool:
    """Return whether images are divided by the deviation twice, as EfficientNet's processor does.

    That is how Keras normalizes the images of its EfficientNets, whose weights these are.
    """
    efficientnet = str(preprocessor.get("image_processor_type")).startswith("EfficientNet")
    return efficientnet and preprocessor.get("include_top", True)


def load_image_size(source: Source) -> int:
    """Load the side in px of the images that a model read, as `write_preprocessor` saved it."""
    content = source.load_dict(ImageProcessingMixin.get_image_processor_dict, PREPROCESSOR)
    with source.reading(PREPROCESSOR, TypeError):
        return int(content["size"]["height"])


def write_preprocessor(folder: Path, normalization: Normalization, image_size: int) -> None:
    """Write the preprocessor_config.json of a model: images are resized, then normalized."""
    content = {
        "image_processor_type": "ViTImageProcessor",  # the plain one, whatever the model
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": normalization.mean,
        "image_std": normalization.std,
    }
    write_json(folder / PREPROCESSOR, content)


def to_pixels(
    grey: torch.Tensor,
    normalization: Normalization,
    transform: Transform | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalize uint8 grey images (B, side, side); returns `dtype` (B, 3, side, side).

    The grey channel is repeated for all three colours. `transform` changes the images before
    normalization; it gets and returns values from 0 to 1, (B, 1, side, side).
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
    """Return mean and deviation, (1, 3, 1, 1); cached, since each copy waits for the device."""
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
