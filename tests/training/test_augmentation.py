"""Augmentation: the right thing is moved, bent and brightened, nothing mirrored."""

import numpy as np
import pytest
import torch
from case import AUGMENT
from scipy.ndimage import center_of_mass

from chest.training.augmentation import KNOTS, change, draw_changes, warp
from chest.training.settings import Augment

COLUMNS = ("rotation", "right", "down", "scale", "contrast", "gamma")
UNCHANGED = dict(zip(COLUMNS, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], strict=True))
STRAIGHT = np.zeros((2, KNOTS, KNOTS))  # shifts of the control points to the right and down
STRONG = Augment(**AUGMENT | {"elastic": 0.03, "gamma": 0.3})


def spot(x, y, side=64):
    """Draw one bright spot at (x, y), float64 (1, 1, side, side)."""
    rows, columns = np.mgrid[:side, :side]
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return torch.from_numpy(image)[None, None]


def row_of(bent=STRAIGHT, **values):
    return torch.tensor([[*(UNCHANGED | values).values(), *bent.ravel()]], dtype=torch.float64)


def changed(image, **values):
    return change(image, row_of(**values).expand(len(image), -1))


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


def test_gamma_brightens_or_darkens_and_keeps_black_and_white():
    image = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64).expand(1, 1, 4, 4)
    expected = torch.tensor([0, 0.0625, 0.25, 1], dtype=torch.float64)
    torch.testing.assert_close(changed(image, gamma=2.0)[0, 0, 0], expected)


def test_bending_all_alike_is_a_shift_and_one_point_bends_its_surroundings():
    image = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    right = STRAIGHT.copy()
    right[0] = 3 / 64
    torch.testing.assert_close(changed(image, bent=right), changed(image, right=3 / 64))
    down = STRAIGHT.copy()
    down[1, 1, 2] = 0.1  # the point at the upper edge, a third from the left
    near, far = (spot(x, y) for x, y in ((21, 4), (60, 60)))
    x, y = np.subtract(place(changed(near, bent=down)), place(near))
    assert x == pytest.approx(0, abs=0.2)
    assert 1 < y < 6.4  # less than the shift of the point itself
    torch.testing.assert_close(changed(far, bent=down), far)


def test_a_mask_moves_with_its_image_and_keeps_its_values():
    image = spot(20, 40)
    both = torch.cat([image, 5 * image], dim=1)
    rows = draw_changes(STRONG, (1,), np.random.default_rng(0))
    moved = warp(both, rows)
    torch.testing.assert_close(moved[:, 1], 5 * moved[:, 0])
    tone = rows.clone()
    tone[:, 4:6] = 1
    torch.testing.assert_close(change(image, tone), moved[:, :1])


def test_nothing_folds_at_the_largest_deformation():
    # Each point moved as far from its neighbours as can be: the order of pixels is kept.
    bent = STRAIGHT.copy()
    bent[0] = 0.0999 * (-1) ** np.arange(KNOTS)
    ramp = torch.linspace(0, 1, 128, dtype=torch.float64).expand(1, 1, 128, 128)
    assert changed(ramp, bent=bent).diff().min() >= 0


def test_changes_fill_their_ranges_and_are_repeatable():
    drawn, again = (draw_changes(STRONG, (50, 100), np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(drawn, again)
    drawn = drawn.reshape(-1, 6 + 2 * KNOTS**2)
    low, high = drawn.min(0).values, drawn.max(0).values
    assert low[:6].tolist() == pytest.approx([-10, -0.05, -0.05, 0.9, 0.8, 1 / 1.3], abs=0.02)
    assert high[:6].tolist() == pytest.approx([10, 0.05, 0.05, 1.1, 1.2, 1.3], abs=0.02)
    assert drawn[:, 5].log().mean().item() == pytest.approx(0, abs=0.01)
    np.testing.assert_allclose([-low[6:], high[6:]], 0.03, atol=1e-3)


def test_nothing_is_mirrored():
    # The heart has a side: a mark on the right stays on the right, whatever is drawn.
    changes = draw_changes(STRONG, (200,), np.random.default_rng(1))
    images = change(spot(52, 32).expand(200, -1, -1, -1), changes)
    assert min(place(image[None])[0] for image in images) > 40
