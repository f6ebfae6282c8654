"""A class-conditional diffusion model of grey images: the U-Net of diffusers, DDPM and DDIM.

The network predicts the velocity, a mixture of noise and image (Salimans and Ho 2022,
arXiv:2202.00512): the noise alone says little of an image where there is much of it. Classes are
LABELS; one more, NULL, stands for any class and allows classifier-free guidance (Ho and Salimans
2022, arXiv:2207.12598).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from chest.core.labels import LABELS
from chest.core.params import Positive, Section
from chest.models.common.device import float_type, saving

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DModel

GROUPS = 8  # of channels that are normalized together
NULL = len(LABELS)
STEPS = 1000  # of the noise schedule

Channels = Annotated[int, Field(ge=GROUPS, le=2048, multiple_of=GROUPS)]


class DiffusionConfig(Section):
    """The U-Net: side of its images in px, channels and residual blocks of each level.

    ``patch``: pixels of patch x patch enter as one, in as many channels; each level but the last
    halves the side. Attention is in the last level.
    """

    image_size: Positive
    channels: Annotated[list[Channels], Field(min_length=1, max_length=8)]
    blocks: Positive
    patch: Positive

    @property
    def multiple(self) -> int:
        """What the side must be a multiple of."""
        return self.patch * 2 ** (len(self.channels) - 1)


class TimeEncoding(nn.Module):
    """The encoding of steps of diffusers, but in double precision."""

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        rates = torch.arange(self.half, device=steps.device, dtype=torch.float64) / self.half
        angles = steps[:, None].double() * 10_000.0**-rates
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class Generator:
    """A U-Net that predicts the velocity of a noisy image, on its device, and its configuration."""

    accelerator: Accelerator
    config: DiffusionConfig
    unet: "UNet2DModel"

    def predict(
        self, unet: nn.Module, noisy: torch.Tensor, steps: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity of `noisy`, same shape, by `unet`, maybe a DDP wrapper of its own."""
        with self.accelerator.autocast():
            patches = pixel_unshuffle(noisy, self.config.patch)
            found = unet(patches, steps, classes, return_dict=False)[0]
        return pixel_shuffle(found, self.config.patch).to(noisy.dtype)

    def sample(
        self, seeds: Sequence[int], classes: Sequence[int], guidance: float, steps: int
    ) -> np.ndarray:
        """Sample an image from each seed, of its class, by DDIM: uint8 (n, side, side).

        An image depends on its own seed and class alone. With a `guidance` of 1, the prediction for
        the class counts; with more, it is driven away from that for NULL.
        """
        side, device = self.config.image_size, self.accelerator.device
        noise = [np.random.default_rng(seed).standard_normal((1, side, side)) for seed in seeds]
        images = torch.from_numpy(np.stack(noise)).to(device, float_type(self.accelerator))
        named = torch.tensor(classes, device=device)
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        for step in scheduler.timesteps.tolist():
            images = scheduler.step(
                self.guided(images, step, named, guidance), step, images
            ).prev_sample
        grey = (images[:, 0].clamp(-1, 1) + 1) * 127.5
        return grey.round().to(torch.uint8).cpu().numpy()

    def guided(
        self, noisy: torch.Tensor, step: int, classes: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        steps = torch.full_like(classes, step)
        found = self.predict(self.unet, noisy, steps, classes)
        if guidance == 1:
            return found
        free = self.predict(self.unet, noisy, steps, torch.full_like(classes, NULL))
        return free + guidance * (found - free)

    @cached_property
    def scheduler(self) -> "DDIMScheduler":
        return make_scheduler()


def make_scheduler() -> "DDIMScheduler":
    """Return the cosine schedule of noise (Nichol and Dhariwal 2021, arXiv:2102.09672)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # from pure noise on
    )


def make_generator(accelerator: Accelerator, config: DiffusionConfig) -> Generator:
    """Return a U-Net with random weights on the accelerator's device."""
    # Here, since importing diffusers takes seconds.
    from diffusers import UNet2DModel

    halvings = len(config.channels) - 1
    unet = UNet2DModel(
        sample_size=config.image_size // config.patch,
        in_channels=config.patch**2,
        out_channels=config.patch**2,
        down_block_types=[*["DownBlock2D"] * halvings, "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", *["UpBlock2D"] * halvings],
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        norm_num_groups=GROUPS,
        num_class_embeds=NULL + 1,
    ).double()
    # Drawn again in double precision: in single, processors differ in the last digit.
    for module in unet.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return _placed(accelerator, config, unet)


def save_generator(generator: Generator, folder: Path) -> None:
    """Write the U-Net in the format of diffusers."""
    with saving(folder):
        generator.unet.save_pretrained(folder)


def load_generator(accelerator: Accelerator, folder: Path) -> Generator:
    """Load the U-Net that `save_generator` wrote."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(folder)
    patch = math.isqrt(unet.config.in_channels)
    config = DiffusionConfig(
        image_size=unet.config.sample_size * patch,
        channels=[*unet.config.block_out_channels],
        blocks=unet.config.layers_per_block,
        patch=patch,
    )
    return _placed(accelerator, config, unet)


def _placed(accelerator: Accelerator, config: DiffusionConfig, unet: "UNet2DModel") -> Generator:
    unet.time_proj = TimeEncoding(config.channels[0])
    # That of its class would warn of a mixture of types.
    nn.Module.to(
        unet, accelerator.device, float_type(accelerator), memory_format=torch.channels_last
    )
    return Generator(accelerator, config, unet)
