"""Augmentation of training images, a batch at a time on the device.

Never mirrored: the heart has a side.
"""

import math
from functools import cache

import numpy as np
import torch
from torch.nn.functional import grid_sample

from chest.training.settings import Augment

KNOTS = 6  # control points of the elastic deformation along each side, a third of the side apart


def draw_changes(
    settings: Augment, shape: tuple[int, ...], rng: np.random.Generator
) -> torch.Tensor:
    """Draw a change for each image of an array of `shape`, float64 (\\*shape, 6 + 72), uniformly.

    Columns: rotation in degrees, shift to the right and down as shares of the side, scale, contrast
    and gamma; then the shifts of the control points to the right and down, as shares of the side.
    Gamma is uniform in its logarithm. All are drawn on the CPU for whole batches, so that they do
    not depend on the device or the number of processes.
    """
    ranges = [settings.rotate, settings.shift, settings.shift, settings.scale, settings.contrast]
    ranges = [*ranges, math.log1p(settings.gamma), *[settings.elastic] * (2 * KNOTS**2)]
    drawn = ranges * rng.uniform(-1, 1, (*shape, len(ranges)))
    drawn[..., 3:5] += 1
    drawn[..., 5] = np.exp(drawn[..., 5])
    return torch.from_numpy(drawn)


def change(images: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Apply `changes`, (B, K), to grey `images` from 0 to 1, (B, 1, side, side).

    Both have the same float type. Images are moved, see `warp`; then contrast is scaled about the
    mean of each image, values are clipped to 0 and 1, and raised to the power of gamma.
    """
    moved = warp(images, changes)
    mean = moved.mean((1, 2, 3), keepdim=True)
    contrast, gamma = changes[:, 4:6, None, None, None].unbind(1)
    return (moved * contrast + mean * (1 - contrast)).clamp(0, 1) ** gamma


def warp(images: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """Apply only what moves pixels, to images or masks of any range, (B, C, side, side).

    They are deformed, rotated (clockwise) and scaled about their centre, then shifted, with
    bilinear interpolation and the border repeated. Masks become shares from 0 to 1.
    """
    # grid_sample needs the place that each pixel comes from, so all changes are inverted.
    angle, scale = torch.deg2rad(changes[:, 0]), changes[:, 3]
    cos, sin = ((f(angle) / scale).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    # -1 and 1 are the centres of the outermost pixels, side - 1 pixels apart.
    side = images.shape[-1]
    line = torch.linspace(-1, 1, side, dtype=images.dtype, device=images.device)
    right, down = (changes[:, 1:3] * (2 * side / (side - 1))).unbind(1)
    x, y = line.view(1, 1, -1) - right.view(-1, 1, 1), line.view(1, -1, 1) - down.view(-1, 1, 1)
    bent = _bend(changes[:, 6:], side) * (2 * side / (side - 1))
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1) - bent
    return grid_sample(images, grid, padding_mode="border", align_corners=True)


def _bend(shifts: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate the shifts of the control points, (B, 72), to all pixels: (B, side, side, 2).

    By cubic B-splines (Rueckert et al. 1999), which are smooth and never exceed the largest shift.
    """
    spline = _spline(side, shifts.device, shifts.dtype)
    knots = shifts.view(-1, 2, KNOTS, KNOTS)
    return (spline @ knots @ spline.T).permute(0, 2, 3, 1)


@cache
def _spline(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of each control point at each pixel, (side, KNOTS), on the device."""
    place = np.linspace(1, KNOTS - 2, side)[:, None]  # in the distance of control points
    distance = np.abs(place - np.arange(KNOTS))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
    return torch.from_numpy(np.where(distance < 1, near, far)).to(device, dtype)
