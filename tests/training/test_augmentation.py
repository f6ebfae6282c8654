"""Augmentation: the right thing is rotated, shifted, scaled and brightened, nothing mirrored."""

import numpy as np
import pytest
import torch
from case import AUGMENT
from scipy.ndimage import center_of_mass

from chest.training.augmentation import change, draw_changes
from chest.training.settings import Augment

COLUMNS = ("rotation", "right", "down", "scale", "contrast")
UNCHANGED = dict(zip(COLUMNS, [0.0, 0.0, 0.0, 1.0, 1.0], strict=True))


def spot(x, y, side=64):
    """Draw one bright spot at (x, y), float64 (1, 1, side, side)."""
    rows, columns = np.mgrid[:side, :side]
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return torch.from_numpy(image)[None, None]


def changed(image, **values):
    row = torch.tensor([[*(UNCHANGED | values).values()]], dtype=torch.float64)
    return change(image, row.expand(len(image), -1))


def place(image):
    """Return x and y of the spot."""
    y, x = center_of_mass(image[0, 0].numpy())
    return [x, y]


def test_no_change_is_the_identity():
    image = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(changed(image), image, atol=1e-12, rtol=0)


def test_a_shift_is_a_share_of_the_side_and_exact_for_whole_pixels():
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    moved = changed(image, right=3 / 64, down=-5 / 64)
    torch.testing.assert_close(moved[..., :-5, 3:], image[..., 5:, :-3], atol=1e-12, rtol=0)


def test_a_quarter_turn_is_clockwise_and_exact():
    image = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    turned = changed(image, rotation=90.0)
    torch.testing.assert_close(turned, image.rot90(-1, (2, 3)), atol=1e-9, rtol=0)


def test_scale_is_about_the_centre():
    assert place(changed(spot(43.5, 31.5), scale=1.1)) == pytest.approx(
        [31.5 + 1.1 * 12, 31.5], abs=0.1
    )


def test_contrast_is_about_the_mean_and_stays_in_range():
    image = torch.rand(1, 1, 32, 32, dtype=torch.float64) * 0.5 + 0.25
    flat = changed(image, contrast=0.8)
    assert flat.std().item() == pytest.approx(0.8 * image.std().item())
    assert flat.mean().item() == pytest.approx(image.mean().item())
    strong = changed(image, contrast=3.0)
    assert (strong.min().item(), strong.max().item()) == (0, 1)


def test_the_border_is_repeated_outside():
    bright = torch.full((1, 1, 32, 32), 0.7, dtype=torch.float64)
    torch.testing.assert_close(changed(bright, right=0.3, rotation=10.0), bright)


def test_changes_fill_their_ranges_and_are_repeatable():
    drawn, again = (
        draw_changes(Augment(**AUGMENT), (50, 100), np.random.default_rng(0)) for _ in range(2)
    )
    assert torch.equal(drawn, again)
    drawn = drawn.reshape(-1, 5)
    assert drawn.min(0).values.tolist() == pytest.approx([-10, -0.05, -0.05, 0.9, 0.8], abs=0.02)
    assert drawn.max(0).values.tolist() == pytest.approx([10, 0.05, 0.05, 1.1, 1.2], abs=0.02)


def test_nothing_is_mirrored():
    # The heart has a side: a mark on the right stays on the right, whatever is drawn.
    changes = draw_changes(Augment(**AUGMENT), (200,), np.random.default_rng(1))
    images = change(spot(52, 32).expand(200, -1, -1, -1), changes)
    assert min(place(image[None])[0] for image in images) > 40
