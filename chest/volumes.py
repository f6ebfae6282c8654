"""Axial slices of NIfTI volumes, as a radiologist looks at them."""

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from chest.errors import ChestError, Problem

LUNG_WINDOW = (-1000.0, 400.0)  # Hounsfield units
GZIP_MAGIC = b"\x1f\x8b"
NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # of the header, 540, in both byte orders


class VolumeError(ChestError):
    """A volume from which no slice can be cut; ``problem`` says why."""

    def __init__(self, problem: Problem):
        self.problem = problem
        super().__init__(str(problem))


@dataclass(frozen=True)
class AxialSlice:
    """One slice of a volume in display orientation.

    ``pixels``: float64, rows x columns, in the volume's own values (Hounsfield units in CT).
    Rows run from anterior to posterior, columns from the patient's right to the patient's left.
    ``index`` counts from the feet, from 0; the volume has ``count`` slices.
    """

    pixels: np.ndarray
    index: int
    count: int


def read_axial_slice(
    path: str | Path, position: Literal["center"] | float = "center"
) -> np.ndarray:
    """One axial slice of the volume file `path` (``.nii`` or ``.nii.gz``), in display orientation.

    The axial axis is the one that the affine names, and `position` runs along it from 0 (feet) to
    1 (head); ``"center"`` is slice n // 2 of n, counted from the feet. However the volume's axes
    are ordered and flipped in the file, the picture is the same. An oblique volume is not
    resampled: its nearest axes are taken.

    Returns float64, rows x columns, in the volume's own values, scaled by the header's slope and
    intercept: anterior up, the patient's right on the picture's left.

    Raises VolumeError where the file is missing, damaged, no NIfTI volume, not of three dimensions
    (a fourth of length 1 is dropped), or the slice holds values that are not finite.
    """
    return cut_axial_slice(path, position).pixels


def cut_axial_slice(path: str | Path, position: Literal["center"] | float = "center") -> AxialSlice:
    """As read_axial_slice, with the slice's place in the volume."""
    image = _read_whole(path)
    axes = _display_axes(path, image)
    axial_axis, axial_flip = axes[2]
    count = image.shape[axial_axis]
    index = count // 2 if position == "center" else round(position * (count - 1))
    selection = [slice(None)] * 3 + [0] * (len(image.shape) - 3)
    selection[axial_axis] = count - 1 - index if axial_flip else index
    pixels = np.asarray(image.dataobj[tuple(selection)], dtype=np.float64)
    if not np.isfinite(pixels).all():
        raise _problem(
            path, f"NaN or infinity in slice {index}", "finite values", "fetch or convert it again"
        )
    return AxialSlice(_display(pixels, axes), index, count)


def check_header(path: str | Path) -> None:
    """Raise VolumeError where the header of `path` alone shows that no slice can be cut."""
    with _refusing(path, "no readable volume", "a NIfTI file"):
        image = nib.load(path)
    _check(path, image)
    _display_axes(path, image)


def to_grey(pixels: np.ndarray, normalize: Literal["minmax", "window"]) -> np.ndarray:
    """Map slice values (any shape) to uint8: the slice's own range, or the lung window, to 0–255.

    Raises ValueError where the slice is constant, since it shows nothing.
    """
    low, high = (pixels.min(), pixels.max()) if normalize == "minmax" else LUNG_WINDOW
    grey = (np.clip(pixels, low, high) - low) / (high - low) if high > low else np.zeros(1)
    if grey.min() == grey.max():
        raise ValueError(f"a constant slice (from {pixels.min():g} to {pixels.max():g})")
    return np.round(grey * 255).astype(np.uint8)


def _read_whole(path: str | Path) -> nib.Nifti1Image:
    """The volume in memory, all of it: a checksum at the end tells whether the file is whole."""
    with _refusing(path, "damaged data", "a whole NIfTI volume"):
        content = Path(path).read_bytes()
        if content[:2] == GZIP_MAGIC:
            content = gzip.decompress(content)
        kind = nib.Nifti2Image if content[:4] in NIFTI2_SIZES else nib.Nifti1Image
        image = kind.from_bytes(content)
    _check(path, image)
    due = image.dataobj.offset + math.prod(image.shape) * image.dataobj.dtype.itemsize
    if len(content) < due:
        raise _problem(path, f"damaged data ({len(content)} of {due} bytes)",
                       "a whole NIfTI volume", "fetch the file again")  # fmt: skip
    return image


def _check(path: str | Path, image: nib.Nifti1Image) -> None:
    if not isinstance(image, nib.Nifti1Image):
        raise _problem(path, type(image).__name__, "a NIfTI file", "convert it to NIfTI")
    if image.dataobj.dtype.kind not in "iuf":
        raise _problem(
            path, f"values of type {image.dataobj.dtype}", "numbers", "convert it to grey"
        )
    shape = image.shape
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or any(n < 1 for n in shape[:3]):
        raise _problem(
            path, f"shape {'x'.join(map(str, shape))}", "three dimensions", "remove it or cut it"
        )


@contextmanager
def _refusing(path: str | Path, found: str, expected: str) -> Iterator[None]:
    """Turn whatever nibabel and the decompressor raise on a damaged file into a VolumeError."""
    try:
        yield
    except FileNotFoundError:
        raise _problem(path, "no such file", "a volume", "fetch it") from None
    except Exception as error:  # they raise many kinds
        raise _problem(path, f"{found} ({error})", expected, "fetch the file again") from None


def _display_axes(path: str | Path, image: nib.Nifti1Image) -> list[tuple[int, bool]]:
    """Which array axis, and whether flipped, gives columns, rows and slices.

    Columns run to the patient's left, rows to posterior, slices to superior.
    """
    affine = image.affine
    singular = not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3
    # RAS+: for each array axis the world axis that it is nearest to, and in which direction.
    world = np.full((3, 2), np.nan) if singular else nib.io_orientation(affine)
    if np.isnan(world).any():
        raise _problem(
            path, "an affine that names no axes", "an invertible affine", "repair its header"
        )
    towards = (-1, -1, 1)  # left, posterior, superior, in RAS+
    array_axis = {int(axis): (i, direction) for i, (axis, direction) in enumerate(world)}
    return [(array_axis[axis][0], array_axis[axis][1] != towards[axis]) for axis in range(3)]


def _display(pixels: np.ndarray, axes: list[tuple[int, bool]]) -> np.ndarray:
    """Turn a slice whose two axes are in the file's order to rows x columns of the display."""
    (column_axis, column_flip), (row_axis, row_flip), _ = axes
    picture = pixels if row_axis < column_axis else pixels.T
    picture = picture[::-1] if row_flip else picture
    return np.ascontiguousarray(picture[:, ::-1] if column_flip else picture)


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> VolumeError:
    return VolumeError(Problem(path, found, expected, remedy))
