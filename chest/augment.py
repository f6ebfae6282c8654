"""Augmentation of training images, a batch at a time on the device.

Never mirrored: the heart has a side.
"""

import torch
from kornia.enhance import adjust_contrast_with_mean_subtraction
from kornia.geometry.transform import get_affine_matrix2d, warp_affine

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

    They are turned and scaled about their centre and shifted, bilinearly; what comes in from
    outside repeats the border. Contrast is about each image's own mean; values stay from 0 to 1.
    """
    side = images.shape[-1]
    rotation, shift, scale = changes[:, 0], changes[:, 1:3] * side, changes[:, 3:4]
    centre = torch.full_like(shift, (side - 1) / 2)
    matrix = get_affine_matrix2d(shift, centre, scale.expand(-1, 2), rotation)[:, :2]
    moved = warp_affine(images, matrix, (side, side), padding_mode="border", align_corners=True)
    return adjust_contrast_with_mean_subtraction(moved, changes[:, 4])
