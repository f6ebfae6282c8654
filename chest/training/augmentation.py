"""Augmentation of training images, a batch at a time on the device.

Never mirrored: the heart has a side.
"""

import numpy as np
import torch
from torch.nn.functional import grid_sample

from chest.training.settings import Augment


def draw_changes(
    settings: Augment, shape: tuple[int, ...], rng: np.random.Generator
) -> torch.Tensor:
    """Draw a change for each image of an array of `shape`, float64 (\\*shape, 5), uniformly.

    Columns: rotation in degrees, shift to the right and down as shares of the side, scale and
    contrast as factors. They are drawn on the CPU for whole batches, so that they do not depend on
    the device or the number of processes.
    """
    ranges = [settings.rotate, settings.shift, settings.shift, settings.scale, settings.contrast]
    unchanged = [0, 0, 0, 1, 1]
    return torch.from_numpy(unchanged + ranges * rng.uniform(-1, 1, (*shape, 5)))


def change(images: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Apply `changes`, (B, 5), to grey `images` from 0 to 1, (B, 1, side, side).

    Both have the same float type. Images are rotated (clockwise) and scaled about their centre,
    then shifted, with bilinear interpolation and the border repeated. Contrast is scaled about the
    mean of each image; values are clipped to 0 and 1.
    """
    # grid_sample needs the place that each pixel comes from, so all changes are inverted.
    angle, scale = torch.deg2rad(changes[:, 0]), changes[:, 3]
    cos, sin = ((f(angle) / scale).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    # -1 and 1 are the centres of the outermost pixels, side - 1 pixels apart.
    side = images.shape[-1]
    line = torch.linspace(-1, 1, side, dtype=images.dtype, device=images.device)
    right, down = (changes[:, 1:3] * (2 * side / (side - 1))).unbind(1)
    x, y = line.view(1, 1, -1) - right.view(-1, 1, 1), line.view(1, -1, 1) - down.view(-1, 1, 1)
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)
    moved = grid_sample(images, grid, padding_mode="border", align_corners=True)
    mean = moved.mean((1, 2, 3), keepdim=True)
    contrast = changes[:, 4].view(-1, 1, 1, 1)
    return (moved * contrast + mean * (1 - contrast)).clamp(0, 1)
