"""What a view shows: the right pixels, the right box, the right grey values."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import grey_dilation
from skimage.exposure import equalize_hist

from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.views import View, fill_boxes, show, unpack

SIDE = 60  # no multiple of 8
CPU = torch.device("cpu")


@pytest.fixture
def case():
    """Three noisy images, with two lungs each but for the last, which has no mask."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 256, (3, SIDE, SIDE), dtype=np.uint8))
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    masks[:2, 10:40, 8:20] = masks[:2, 15:44, 26:38] = True
    masks[1] = masks[1].roll((4, 7), (0, 1))
    return images, masks


def test_everything_needs_no_masks_and_changes_nothing(case):
    images, _ = case
    assert not View().needs_masks
    assert show(images, None, View()) is images


def test_regions(case):
    images, masks = case
    lungs = show(images, masks, View(visible="lungs"))
    rest = show(images, masks, View(visible="no_lungs"))
    assert torch.equal(lungs, images * masks)
    assert torch.equal(lungs + rest, images)
    assert torch.equal(show(images, masks, View(visible="mask")), masks.byte() * 255)
    border = show(images, None, View(visible="border"))
    hidden = border == 0
    assert hidden[:, 5:-5, 5:-5].all()  # 8 % of 60 px
    assert torch.equal(border[~hidden], images[~hidden])
    assert (~hidden).sum().item() == 3 * (60**2 - 50**2)


def test_a_cropped_border_is_refused():
    with pytest.raises(ValidationError, match="nothing of the border is left"):
        View(visible="border", crop=True)


@pytest.mark.parametrize("share", [0.01, 0.02, 0.04, 0.08])
def test_dilation_is_a_share_of_the_side(case, share):
    images, masks = case
    shown = show(images, masks, View(visible="lungs", dilate=share))
    width = 2 * round(share * SIDE) + 1
    grown = grey_dilation(masks.numpy(), (1, width, width))
    np.testing.assert_array_equal(shown.numpy(), images.numpy() * grown)


def test_a_box_is_the_filled_box_around_the_mask(case):
    _, masks = case
    boxes = fill_boxes(masks)
    assert boxes[0, 10:44, 8:38].all()
    assert boxes[0].sum() == 34 * 30
    images = torch.full_like(masks, 9, dtype=torch.uint8)
    assert torch.equal(show(images, masks, View(visible="lungs", masks="box")), boxes * 9)


def test_a_crop_is_bilinear_square_and_inside_the_image(case):
    images, masks = case
    masks[1] = False
    masks[1, 50:60, 0:20] = True  # at the edge: the square moves into the image
    shown = show(images, masks, View(crop=True))
    for image, cropped, (left, top, size) in zip(
        images, shown, [(6, 10, 34), (0, 40, 20), (0, 0, SIDE)], strict=True
    ):
        box = (left, top, left + size, top + size)
        picture = Image.fromarray(image.numpy().astype(np.float32))
        expected = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
        inner = slice(2, -2)  # Pillow takes no pixel outside the box
        difference = np.abs(cropped.numpy() - np.asarray(expected))[inner, inner]
        assert difference.max() <= 0.51
    assert torch.equal(shown[2], images[2])


def test_stretching_goes_by_the_visible_pixels(case):
    images, masks = case
    images[masks] = images[masks] // 4 + 100
    shown = show(images, masks, View(visible="lungs", grey="stretch"))
    for image, mask, new in zip(images[:2], masks, shown, strict=False):
        low, high = np.percentile(image[mask], (2, 98), method="inverted_cdf").astype(float)
        expected = ((image[mask].numpy() - low) / (high - low) * 255).clip(0, 255)
        assert np.abs(new[mask].numpy() - expected).max() <= 0.5
        assert not new[~mask].any()


def test_equalizing_goes_by_the_visible_pixels(case):
    images, masks = case
    images[masks] = (images[masks].float() ** 2 / 512).byte() + 1
    shown = show(images, masks, View(visible="lungs", grey="equalize"))
    for image, mask, new in zip(images[:2], masks, shown, strict=False):
        share = equalize_hist(image.numpy(), nbins=256, mask=mask.numpy())[mask]
        expected = (share - share.min()) / (1 - share.min()) * 255
        assert np.abs(new[mask].numpy() - expected).max() <= 1


def test_standardized_images_do_not_know_the_scanner(case):
    images, masks = case
    images = images // 3 + 20
    for grey in ("stretch", "equalize"):
        view = View(visible="lungs", grey=grey, crop=True)
        shown, brighter = (show(x, masks, view)[:2] for x in (images, images * 2 + 10))
        assert torch.equal(shown, brighter)


@pytest.mark.parametrize("value", [0, 200])
def test_one_grey_value_or_no_visible_pixel_is_no_error(value):
    images = torch.full((2, SIDE, SIDE), value, dtype=torch.uint8)
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    masks[0] = True
    for grey in ("stretch", "equalize"):
        shown = show(images, masks, View(visible="lungs", grey=grey, crop=True))
        assert not shown.any()


@pytest.mark.parametrize("device", [CPU, torch.device("cpu:0")])
def test_a_store_shows_each_batch_through_its_view(case, device):
    images, masks = case
    packed = torch.from_numpy(np.packbits(masks.numpy(), axis=-1))
    assert torch.equal(unpack(packed), masks)
    view = View(visible="lungs", dilate=0.02, crop=True, grey="stretch")
    store = ImageStore(images, device, packed, view)
    batches = [np.array([2, 0]), np.array([1])]
    for rows, batch in zip(batches, store.stream(batches), strict=True):
        assert torch.equal(batch, show(images[rows], masks[rows], view))
        assert torch.equal(store.take(rows), batch)
    placed = place_images(images.numpy(), CPU, packed.numpy(), view)
    assert torch.equal(placed.take(np.arange(3)), show(images, masks, view))
