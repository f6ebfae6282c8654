"""Augmentation of training images, a batch at a time on the device.

Never mirrored: the heart has a side.
"""

import torch
from torch.nn.functional import affine_grid, grid_sample

from chest.params import Augment


def draw_changes(settings: Augment, count: int, generator: torch.Generator) -> torch.Tensor:
    """How each of `count` images is to be changed, float32 (count, 5), uniform in their ranges.

    Columns: rotation in degrees, shift to the right and down in shares of the side, scale, contrast
    (factors). Drawn on the CPU, so that every device and any number of processes change an image
    alike.
    """
    ranges = torch.tensor(
        [settings.rotate, settings.shift, settings.shift, settings.scale, settings.contrast]
    )
    unchanged = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    return unchanged + ranges * (2 * torch.rand(count, 5, generator=generator) - 1)


def change(images: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Grey `images` from 0 to 1, float32 (B, 1, side, side), changed as `changes`, (B, 5), says.

    They are turned (clockwise) and scaled about their centre and shifted, bilinearly; what
    comes in from outside repeats the border. Contrast is about each image's own mean; values stay
    from 0 to 1.
    """
    # grid_sample asks where each pixel comes from: the inverse, which here needs no solver (on a
    # GPU a solver would wait for the device).
    angle, scale = torch.deg2rad(changes[:, 0]), changes[:, 3]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    turn = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    # From -1 to 1 between the centres of the outermost pixels: a length of 2 is side - 1 pixels.
    side = images.shape[-1]
    shift = changes[:, 1:3, None] * (2 * side / (side - 1))
    grid = affine_grid(torch.cat([turn, -turn @ shift], dim=2), images.shape, align_corners=True)
    moved = grid_sample(images, grid, padding_mode="border", align_corners=True)
    mean = moved.mean((1, 2, 3), keepdim=True)
    contrast = changes[:, 4].view(-1, 1, 1, 1)
    return (moved * contrast + mean * (1 - contrast)).clamp(0, 1)
