"""Lung masks: reading and packing them, the lungs of CT slices by thresholds, and the gate.

A mask is bool, (side, side); packed, eight of its pixels are one byte: (side, ceil(side / 8)).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import center_of_mass, distance_transform_edt, find_objects
from skimage.filters import threshold_otsu
from skimage.measure import label
from skimage.morphology import (
    isotropic_closing,
    isotropic_dilation,
    isotropic_erosion,
    isotropic_opening,
)
from skimage.segmentation import watershed

from chest.core.errors import Problem
from chest.data.dataset import IMAGES, open_packed
from chest.data.pictures import PictureError, decode

MASKS = Path("data/masks")
MASK_INDEX = MASKS / "index.csv"
# method: unet, threshold or none; area: share of the image; parts: connected ones; dice: with the
# published mask, empty without one.
MASK_COLUMNS = ("image_id", "method", "area", "parts", "accepted", "dice")

# A published mask is black and white; JPEG and resizing leave a few values between.
END, BETWEEN = 32, 0.1  # grey levels that count as one end, and the share that may lie between

# The gate: outside are masks that have lost a lung, or have taken the air around the body for one.
# Of 704 published masks of X-rays 699 are within; of the masks of 1,110 real CT slices all but two,
# where a lung is lost and where the patient lies on the side.
AREA = (0.06, 0.65)  # share of the image
MAX_PARTS = 2
ROWS, COLUMNS = (0.2, 0.75), (0.38, 0.62)  # where the centre lies: that of one lung is at a side

CORNERS = ([0, 0, -1, -1], [0, -1, 0, -1])  # rows and columns

# Segmentation of CT slices; lengths are shares of the side.
DARK = 2  # grey levels above the corners that count as padding outside the scanner's circle
RIM = 0.01  # of the circle, blurred by resizing
WALL = 0.3  # of the way from air to tissue: a thin chest wall is above, blurred as it may be
SKIN = 0.02  # thickness; as dark as ground glass, since it is half air
NECK = 0.02  # radius: what sticks out of the body, such as the table, is thinner
SOFT = 0.75  # of the way from air to tissue: ground glass is below
CORES = np.arange(8) * 0.01  # how far lungs that touch are eroded until they part
BALANCE = 0.2  # the smaller lung is at least this share of the larger one
LEAST = 0.004  # of the image: smaller parts are windpipe and bowel
CLOSING = 0.1  # radius: consolidation at the border of a lung is taken in


class MaskFigures(NamedTuple):
    """What the gate looks at: share of the image, connected parts, and the verdict."""

    area: float
    parts: int
    accepted: bool


# --- Files -----------------------------------------------------------------------------------


def pack(masks: np.ndarray) -> np.ndarray:
    """Pack bool masks (..., side, side) to uint8 (..., side, ceil(side / 8))."""
    return np.packbits(masks, axis=-1)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Unpack uint8 (..., side, ceil(side / 8)) to bool masks (..., side, side)."""
    return np.unpackbits(packed, axis=-1, count=packed.shape[-2]).view(bool)


def packed_shape(count: int, side: int) -> tuple[int, int, int]:
    """Return the shape of `count` packed masks."""
    return count, side, -(-side // 8)


def read_masks(count: int, side: int) -> np.ndarray:
    """Open ``data/masks/<side>.npy``, one packed mask per row of the manifest, a memory map.

    Raises InputError if the file is missing or holds anything else.
    """
    return open_packed(MASKS / f"{side}.npy", packed_shape(count, side))


def read_published_masks(manifest: pd.DataFrame, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of `manifest` with a published mask, int64 (M,), and these masks, packed.

    Raises InputError if ``data/images/lungs_<side>.npy`` is missing or holds anything else.
    """
    rows = np.flatnonzero(manifest["mask"] != "")
    return rows, open_packed(published_path(side), packed_shape(len(rows), side))


def published_path(side: int, folder: Path = IMAGES) -> Path:
    """Return where the published masks of `side` px are packed."""
    return folder / f"lungs_{side}.npy"


def read_published_mask(path: str | Path, sides: Sequence[int]) -> dict[int, np.ndarray] | Problem:
    """Read the published mask `path` and resize it to each of `sides`; a Problem if it is none."""
    try:
        grey = np.asarray(decode(path))
    except PictureError as error:
        return error.problem
    low, high = int(grey.min()), int(grey.max())
    end = min(END, (high - low) // 4)
    between = np.mean((grey > low + end) & (grey < high - end))
    if low == high or between > BETWEEN:
        found = "one grey value" if low == high else f"{between:.0%} neither black nor white"
        remedy = "look at it; fetch it again, or remove it: a mask may be missing"
        return Problem(path, found, "a mask of the lungs, white on black", remedy)
    return {side: resize_mask(grey > (low + high) / 2, side) for side in sides}


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize a mask of any shape to (side, side): pixels of which lungs cover at least half.

    Not keeping the aspect ratio, as images are resized. In whole numbers, so that all processors
    agree.
    """
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize((side, side), Image.Resampling.BOX)) >= 128


# --- The gate --------------------------------------------------------------------------------


def measure(mask: np.ndarray) -> MaskFigures:
    """Return the figures of a mask, and whether it can be the mask of two lungs."""
    area, parts = float(mask.mean()), int(label(mask, connectivity=2).max())
    if not parts:
        return MaskFigures(area, parts, False)
    row, column = (centre / len(mask) for centre in center_of_mass(mask))
    inside = all(
        low <= value <= high
        for value, (low, high) in ((area, AREA), (row, ROWS), (column, COLUMNS))
    )
    return MaskFigures(area, parts, inside and parts <= MAX_PARTS)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice coefficient of two masks; 1 if both are empty."""
    total = mask.sum() + truth.sum()
    return float(2 * (mask & truth).sum() / total) if total else 1.0


# --- Parts of masks --------------------------------------------------------------------------


def keep_lungs(mask: np.ndarray) -> np.ndarray:
    """Return the two largest parts of a mask, their holes filled."""
    parts = label(mask, connectivity=1)
    return fill_holes(_among(parts, _largest(parts, 2)))


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill what `mask` encloses."""
    return ~_reached_from_corners(~mask)


def _reached_from_corners(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of `mask` that are connected to a corner of the image.

    Not to its edges: they cut through the chest wall of a large patient, or through the lungs.
    """
    parts = label(mask, connectivity=1)
    return mask & _among(parts, parts[CORNERS])


def _among(parts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return where `parts` has one of `numbers`; np.isin takes five times as long."""
    chosen = np.zeros(parts.max() + 1, bool)
    chosen[numbers] = True
    return chosen[parts]


def _largest(parts: np.ndarray, count: int) -> np.ndarray:
    """Return the numbers of the `count` largest parts, from the largest; ties in their order."""
    sizes = np.bincount(parts.ravel())[1:]
    return np.argsort(-sizes, kind="stable")[:count] + 1


# --- CT slices -------------------------------------------------------------------------------


def segment_ct(image: np.ndarray) -> np.ndarray:
    """Return the lungs in an axial CT slice, uint8 (side, side): air inside the body.

    Each lung is closed by a disk, so that consolidation at its border stays in, and holes are
    filled. An image without a body gives an empty mask.
    """
    body = find_body(image)
    if not body.any():
        return body
    lungs = np.zeros_like(body)
    inside = isotropic_erosion(body, SKIN * len(image))
    for part in part_lungs(inside & (image <= level_between(image[body], SOFT))):
        lungs |= fill_holes(_close(part, CLOSING * len(image)))
    return lungs & body


def find_body(image: np.ndarray) -> np.ndarray:
    """Return the largest bright part of a CT slice with all that it encloses.

    What is as dark as the corners and reaches one, such as padding outside the scanner's circle,
    takes no part in the threshold.
    """
    side = len(image)
    padding = min(np.median(image[CORNERS]) + DARK, threshold_otsu(image))
    outside = _reached_from_corners(image <= padding)
    inside = ~isotropic_dilation(outside, RIM * side)
    if not inside.any():
        return inside
    tissue = inside & (image > level_between(image[inside], WALL))
    parts = label(tissue, connectivity=1)
    # Filled before it is opened: the chest wall of a thin patient is as thin as the table.
    return isotropic_opening(fill_holes(_among(parts, _largest(parts, 1))), NECK * side)


def level_between(values: np.ndarray, share: float) -> float:
    """Return the grey value that lies at `share` of the way from air to tissue in `values`."""
    dark = values <= threshold_otsu(values)
    if dark.all():  # one value only
        return float(values[0])
    air, tissue = np.median(values[dark]), np.median(values[~dark])
    return air + share * (tissue - air)


def part_lungs(air: np.ndarray) -> list[np.ndarray]:
    """Return the one or two lungs in `air`, parted where they touch.

    Lungs that touch, in front of the heart, would enclose it. They are eroded until the two largest
    parts are of similar size, which then grow back to meet at the thinnest place.
    """
    depth = distance_transform_edt(np.pad(air, 1))[1:-1, 1:-1]
    for core in CORES:
        parts = label(depth > core * len(air), connectivity=1)
        sizes = np.bincount(parts.ravel())
        found = _largest(parts, 2)
        if len(found) == 2 and sizes[found[1]] >= max(BALANCE * sizes[found[0]], LEAST * air.size):
            seeds = (parts == found[0]) + 2 * (parts == found[1])
            grown = watershed(-depth, seeds, mask=air)
            return [grown == 1, grown == 2]
    parts = label(air, connectivity=1)
    return [parts == number for number in _largest(parts, 1)]


def _close(mask: np.ndarray, radius: float) -> np.ndarray:
    """Close a mask by a disk, as if there were background beyond the image."""
    width = int(radius) + 2
    [box] = find_objects(mask.astype(np.uint8))
    closed = np.zeros_like(mask)
    closed[box] = isotropic_closing(np.pad(mask[box], width), radius)[width:-width, width:-width]
    return closed
