"""Augmentation: the right thing is turned, shifted, scaled and brightened, and nothing mirrored."""

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from chest.augment import change, draw_changes
from chest.params import Augment

LIGHT = Augment(rotate=10.0, shift=0.05, scale=0.1, contrast=0.2)
UNCHANGED = [0.0, 0.0, 0.0, 1.0, 1.0]  # rotation, shift to the right, down, scale, contrast


def spot(x, y, side=64):
    """A picture with one bright spot at (x, y), float32 (1, 1, side, side)."""
    rows, columns = np.mgrid[:side, :side]
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return torch.from_numpy(image).float()[None, None]


def place(image):
    """Where the spot lies: x, y."""
    y, x = center_of_mass(image[0, 0].numpy())
    return pytest.approx([x, y], abs=0.1)


def changed(image, **columns):
    values = list(UNCHANGED)
    for name, value in columns.items():
        values[("rotation", "right", "down", "scale", "contrast").index(name)] = value
    return change(image, torch.tensor([values]))


def test_nothing_drawn_changes_nothing():
    image = torch.rand(2, 1, 32, 32)
    assert change(image, torch.tensor([UNCHANGED] * 2)) == pytest.approx(image, abs=1e-5)


def test_a_shift_is_in_shares_of_the_side():
    assert place(changed(spot(20, 40), right=0.05, down=-0.1)) == [20 + 64 * 0.05, 40 - 64 * 0.1]


def test_scale_and_rotation_are_about_the_centre():
    assert place(changed(spot(43.5, 31.5), scale=1.1)) == [31.5 + 1.1 * 12, 31.5]
    turned = changed(spot(43.5, 31.5), rotation=30.0)
    y, x = center_of_mass(turned[0, 0].numpy())
    assert np.hypot(x - 31.5, y - 31.5) == pytest.approx(12, abs=0.1)
    # Clockwise: rows count downwards.
    assert np.degrees(np.arctan2(y - 31.5, x - 31.5)) == pytest.approx(30, abs=0.5)


def test_contrast_is_about_the_mean_and_stays_in_range():
    image = torch.rand(1, 1, 32, 32) * 0.5 + 0.25
    assert changed(image, contrast=0.8).std() == pytest.approx(image.std().item() * 0.8, rel=1e-3)
    assert changed(image, contrast=0.8).mean() == pytest.approx(image.mean().item(), rel=1e-3)
    strong = changed(torch.rand(1, 1, 32, 32), contrast=1.9)
    assert strong.min() >= 0
    assert strong.max() <= 1


def test_what_comes_in_from_outside_repeats_the_border():
    bright = torch.full((1, 1, 32, 32), 0.7)
    moved = changed(bright, right=0.3, rotation=10.0)
    assert moved == pytest.approx(bright, abs=1e-5)


def test_each_image_has_a_change_of_its_own():
    images = torch.cat([spot(20, 20), spot(20, 20)])
    one, two = change(images, torch.tensor([UNCHANGED, [0, 0.2, 0, 1, 1.0]]))
    assert place(one[None]) == [20, 20]
    assert place(two[None]) == [20 + 64 * 0.2, 20]


def test_changes_stay_in_their_ranges_and_fill_them():
    drawn = draw_changes(LIGHT, 5000, torch.Generator().manual_seed(0))
    lowest, highest = drawn.min(0).values.tolist(), drawn.max(0).values.tolist()
    assert lowest == pytest.approx([-10, -0.05, -0.05, 0.9, 0.8], abs=0.02)
    assert highest == pytest.approx([10, 0.05, 0.05, 1.1, 1.2], abs=0.02)


def test_nothing_is_mirrored():
    # The heart has a side: a mark on the right stays on the right, whatever is drawn.
    changes = draw_changes(LIGHT, 200, torch.Generator().manual_seed(1))
    _, columns = zip(
        *(
            center_of_mass(i[0].numpy())
            for i in change(spot(52, 32).expand(200, -1, -1, -1), changes)
        ),
        strict=True,
    )
    assert min(columns) > 40
