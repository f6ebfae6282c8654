"""Lung segmentation of X-rays by a small U-Net (Falk et al. 2019), MONAI's BasicUNet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate

from chest.core.files import write_json
from chest.core.params import Section
from chest.data.masks import keep_lungs
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import float_type, saving

CONFIG, WEIGHTS = "config.json", "model.safetensors"
GROUPS = 4  # of channels that are normalized together: statistics of one image, not of a batch
LEVELS = 4  # halvings of the side
FLAT = 1e-3  # least deviation of an image's grey values, from 0 to 1

Channels = Annotated[int, Field(ge=GROUPS, le=1024, multiple_of=GROUPS)]


class UNetConfig(Section):
    """Side of the images in px, and channels: of the five levels, and before the output."""

    image_size: Annotated[int, Field(ge=2**LEVELS, le=1024, multiple_of=2**LEVELS)]
    channels: Annotated[list[Channels], Field(min_length=6, max_length=6)]


@dataclass(frozen=True)
class LungSegmenter:
    """A U-Net on its device, and its configuration."""

    accelerator: Accelerator
    config: UNetConfig
    model: nn.Module

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logit of lung for each pixel of uint8 images (B, side, side), same shape."""
        dtype = float_type(self.accelerator)
        pixels = standardize(to_grey(images, self.config.image_size, dtype))
        with self.accelerator.autocast():
            logits = self.model(pixels).to(dtype)
        side = images.shape[-1]
        return interpolate(logits, (side, side), mode="bilinear", align_corners=False)[:, 0]

    def segment(self, images: torch.Tensor) -> np.ndarray:
        """Return the lungs in uint8 images (B, side, side) on the device: bool, the same shape.

        The two largest parts of what the network finds, with their holes filled.
        """
        with torch.inference_mode():
            found = (self.logits(images) > 0).cpu().numpy()
        return np.stack([keep_lungs(mask) for mask in found])


def make_segmenter(accelerator: Accelerator, config: UNetConfig) -> LungSegmenter:
    """Return a U-Net with random weights on the accelerator's device."""
    # Here, since importing MONAI takes five seconds.
    from monai.networks.nets import BasicUNet

    model = BasicUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        features=config.channels,
        norm=("group", {"num_groups": GROUPS}),
    ).double()
    # Drawn again in double precision: in single, processors differ in the last digit.
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    # Twice as fast on a CPU as the usual order.
    model = model.to(accelerator.device, float_type(accelerator), memory_format=torch.channels_last)
    return LungSegmenter(accelerator, config, model)


def save_segmenter(segmenter: LungSegmenter, folder: Path) -> None:
    """Write weights (safetensors) and configuration to `folder`."""
    weights = {name: x.contiguous() for name, x in segmenter.model.state_dict().items()}
    with saving(folder):
        save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, segmenter.config.model_dump())


def load_segmenter(accelerator: Accelerator, folder: Path) -> LungSegmenter:
    """Load the U-Net that `save_segmenter` wrote; raises CheckpointError if it cannot be read."""
    source = find_checkpoint(str(folder), "main")
    with source.reading(CONFIG, ValidationError):
        text = (folder / CONFIG).read_text(encoding="utf-8")
        segmenter = make_segmenter(accelerator, UNetConfig.model_validate_json(text))
    with source.reading(WEIGHTS, RuntimeError):  # of another shape
        segmenter.model.load_state_dict(load_file(folder / WEIGHTS))
    segmenter.model.eval()
    return segmenter


def to_grey(images: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Resize uint8 images (B, side, side) to (B, 1, size, size), `dtype`, from 0 to 1."""
    grey = images[:, None].to(dtype) / 255
    if images.shape[-1] == size:
        return grey
    return interpolate(grey, (size, size), mode="bilinear", align_corners=False, antialias=True)


def standardize(grey: torch.Tensor) -> torch.Tensor:
    """Bring each image (B, 1, side, side) to mean 0 and deviation 1, whatever its exposure."""
    deviation, mean = torch.std_mean(grey, (1, 2, 3), keepdim=True)
    return (grey - mean) / deviation.clamp(min=FLAT)
