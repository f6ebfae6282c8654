"""What of an image a model is shown: the lungs alone, all but the lungs, the border, the mask.

A network finds the hospital in the border of a film and the scanner in the grey values of a slice.
A `View` takes both away: `ImageStore` applies it to each batch on the device, so that training,
features, predictions and explanations are shown the same. All arithmetic is in whole numbers, so
that every device shows the same picture.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn.functional import pad

from chest.core.params import Section
from chest.data.regions import BORDER

LOW, HIGH = 2, 98  # percentiles of the visible pixels that become black and white


class View(Section):
    """What is visible, by which masks, and how it is brought to the whole picture."""

    visible: Literal["everything", "lungs", "no_lungs", "border", "mask"] = "everything"
    # true: the published mask where there is one. box: the box around the predicted mask.
    # shuffled: the mask of another patient.
    masks: Literal["predicted", "true", "box", "shuffled"] = "predicted"
    dilate: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.0  # share of the side
    crop: bool = False  # to the box of the mask
    grey: Literal["as_is", "stretch", "equalize"] = "as_is"
    rejected: Literal["whole", "unanswered"] = "whole"  # images whose mask the gate rejected

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.visible == "border" and self.crop:
            raise ValueError("crop: cropped to the lungs, nothing of the border is left")
        return self

    @property
    def shows_all(self) -> bool:
        """Whether images are shown as they are."""
        return self.visible == "everything" and not self.crop and self.grey == "as_is"

    @property
    def needs_masks(self) -> bool:
        """Whether a lung mask is needed for each image."""
        return self.crop or self.visible in ("lungs", "no_lungs", "mask")


def show(images: torch.Tensor, masks: torch.Tensor | None, view: View) -> torch.Tensor:
    """Return what `view` shows of uint8 `images` (B, side, side), of the same type and shape.

    `masks` is bool, (B, side, side), or None if the view needs none. What is hidden becomes 0.
    """
    if masks is not None:
        masks = dilate(fill_boxes(masks) if view.masks == "box" else masks, view.dilate)
    visible = _visible(images, masks, view.visible)
    if view.visible == "mask":
        shown = masks.to(torch.uint8) * 255
    else:
        shown = map_greys(images, visible, view.grey)
    if visible is not None:
        shown = shown * visible
    return crop_to(shown, masks) if view.crop else shown


def _visible(images: torch.Tensor, masks: torch.Tensor | None, visible: str) -> torch.Tensor | None:
    """Return the visible pixels, bool (B, side, side); None: all."""
    if visible in ("lungs", "no_lungs"):
        return masks if visible == "lungs" else ~masks
    if visible != "border":
        return None
    side = images.shape[-1]
    width = max(1, round(BORDER * side))
    region = torch.ones_like(images, dtype=torch.bool)
    region[:, width : side - width, width : side - width] = False
    return region


# --- Masks -----------------------------------------------------------------------------------


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return bool masks (B, side, side) of packed bits, uint8 (B, side, ceil(side / 8))."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).flatten(2)[..., : packed.shape[1]].bool()


def dilate(masks: torch.Tensor, share: float) -> torch.Tensor:
    """Grow `masks`, bool (B, side, side), by `share` of the side: a square about each pixel."""
    radius = round(share * masks.shape[-1])
    for axis in (1, 2):
        masks = _grow(masks, axis, radius)
    return masks


def _grow(masks: torch.Tensor, axis: int, radius: int) -> torch.Tensor:
    """Set each pixel that has a set one within `radius` along `axis`."""
    masks = pad(masks, (0, 0, radius, radius) if axis == 1 else (radius, radius))
    width = 1  # of the window whose pixels have been joined; doubled until it is wide enough
    while width < 2 * radius + 1:
        step = min(width, 2 * radius + 1 - width)
        kept = masks.shape[axis] - step
        masks = masks.narrow(axis, 0, kept) | masks.narrow(axis, step, kept)
        width += step
    return masks


def fill_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the box around each mask, filled: bool (B, side, side)."""
    place = torch.arange(masks.shape[-1], device=masks.device)
    rows, columns = (
        (place >= first[:, None]) & (place < (first + length)[:, None])
        for first, length in (_extent(masks.any(axis)) for axis in (2, 1))
    )
    return rows[:, :, None] & columns[:, None, :]


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first occupied place and how many there are to the last, int64 (B,) each.

    Where none is occupied, that is all of them.
    """
    side = occupied.shape[1]
    first, behind = (x.int().argmax(1) for x in (occupied, occupied.flip(1)))
    return first, side - first - behind


# --- Crop ------------------------------------------------------------------------------------


def crop_to(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Crop `images` to the box of their masks and enlarge them to the side, bilinearly.

    Boxes are widened to squares inside the image, so that lungs keep their proportions. An image
    without a mask stays whole.
    """
    side = images.shape[-1]
    (top, height), (left, width) = (_extent(masks.any(axis)) for axis in (2, 1))
    size = torch.maximum(height, width)
    starts = [
        (start - (size - length) // 2).clamp(min=0).minimum(side - size)
        for start, length in ((top, height), (left, width))
    ]
    rows, columns = (_interpolation(start, size, side) for start in starts)
    values = _resample(images.int(), 1, *rows)
    values = _resample(values, 2, *columns)
    total = (2 * side) ** 2
    return ((values + total // 2) // total).to(torch.uint8)


def _interpolation(
    start: torch.Tensor, size: torch.Tensor, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each of `side` pixels lies in the `size` ones from `start`.

    That is the pixel before it, int64 (B, side), and the weight of the one behind, from 0 to
    2 side - 1: whole numbers of 1 / (2 side), as centres of pixels lie.
    """
    centre = 2 * torch.arange(side, device=start.device) + 1
    place = centre * size[:, None] - side + 2 * side * start[:, None]
    place = place.clamp(0, 2 * side * (side - 1))
    return place // (2 * side), (place % (2 * side)).int()


def _resample(
    values: torch.Tensor, axis: int, before: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Interpolate int32 `values`, (B, side, side), along `axis`, times 2 side."""
    side = values.shape[-1]
    after = (before + 1).clamp(max=side - 1)
    weight = weight.unsqueeze(3 - axis)
    low, high = (
        values.gather(axis, index.unsqueeze(3 - axis).expand_as(values))
        for index in (before, after)
    )
    return low * (2 * side - weight) + high * weight


# --- Grey values -----------------------------------------------------------------------------


def map_greys(images: torch.Tensor, visible: torch.Tensor | None, grey: str) -> torch.Tensor:
    """Map the grey values of each image by those of its `visible` pixels; None: all pixels.

    ``stretch``: from the 2nd to the 98th percentile to 0 to 255. ``equalize``: each value becomes
    the share of the pixels below it, so that all are equally frequent.
    """
    if grey == "as_is":
        return images
    curve = {"stretch": _stretch, "equalize": _equalize}[grey]
    table = curve(_cumulated(images, visible)).to(torch.uint8)
    return table.gather(1, images.flatten(1).long()).view_as(images)


def _cumulated(images: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return how many visible pixels have each value or a lower one: int64 (B, 256)."""
    values = images.flatten(1).long()
    counted = torch.ones_like(values) if visible is None else visible.flatten(1).long()
    return values.new_zeros(len(values), 256).scatter_add_(1, values, counted).cumsum(1)


def _stretch(cumulated: torch.Tensor) -> torch.Tensor:
    low, high = (
        # The lowest level with at least so many pixels at or below it.
        (100 * cumulated >= percent * cumulated[:, -1:]).int().argmax(1, keepdim=True)
        for percent in (LOW, HIGH)
    )
    levels = torch.arange(256, device=cumulated.device)
    return _divide(255 * (levels - low), high - low).clamp(0, 255)


def _equalize(cumulated: torch.Tensor) -> torch.Tensor:
    lowest = cumulated.masked_fill(cumulated == 0, cumulated.max()).amin(1, keepdim=True)
    return _divide(255 * (cumulated - lowest), cumulated[:, -1:] - lowest).clamp(0, 255)


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Return the quotient rounded to a whole number; a denominator of 0 counts as 1."""
    denominator = denominator.clamp(min=1)
    return (2 * numerator + denominator) // (2 * denominator)
