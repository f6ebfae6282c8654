"""Axial slices of NIfTI volumes, as a radiologist looks at them."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy

from chest.core.errors import FileError, Problem
from chest.core.params import Fraction, Section

# What nibabel logs about a bad header is part of our own message.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

AIR = -1024.0  # Hounsfield units; padding outside the scanner's circle has lower values
LUNG_WINDOW = (-1000.0, 400.0)  # Hounsfield units
AERATED = -300.0  # Hounsfield units; the air and the lungs of a chest are below
UNSIGNED = 2.0**15 + AIR  # where negative values begin if an offset or a type has lost their sign
A_FEW = 0.01  # of the pixels of a slice
MIN_SIDE, OBLONG = 16, 2.0  # of a slice: px, and how much longer than wide it may be
GZIP_MAGIC = b"\x1f\x8b"
MAX_PIXELS = 4096 * 4096  # of a slice; CT has 512 x 512
CHUNK = 256 * 1024  # bytes that are inflated at a time for the checksum alone
NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # of the header, 540, in both byte orders

Position = Literal["center"] | float


class Slices(Section):
    """The block ``slices`` in params.yaml."""

    position: Literal["center"] | Fraction
    normalize: Literal["minmax", "window"]
    verify: bool


class VolumeError(FileError):
    """A volume from which no slice can be cut."""


@dataclass(frozen=True)
class AxialSlice:
    """One slice of a volume in display orientation.

    ``pixels``: float64, (rows, columns), in the volume's own values (Hounsfield units in CT).
    ``index`` counts from the feet, from 0; the volume has ``count`` slices.
    """

    pixels: np.ndarray
    index: int
    count: int


def read_axial_slice(path: str | Path, position: Position = "center") -> np.ndarray:
    """Read one axial slice of the volume `path` (``.nii`` or ``.nii.gz``) in display orientation.

    The axial axis is the one that the affine names; `position` runs along it from 0 (feet) to 1
    (head), and "center" is slice n // 2 of n. In whatever order and direction the file stores its
    axes, the picture is the same: anterior up, the patient's right on the left. An oblique volume
    is not resampled: its nearest axes are taken.

    Returns float64, (rows, columns), in the volume's own values, scaled by the header's slope and
    intercept. The file is inflated only as far as the slice: a truncated file is noticed, a flipped
    bit may not be (see `cut_axial_slice`).

    Raises VolumeError if the file is missing, truncated, no NIfTI volume of three dimensions (a
    fourth of length 1 is dropped), or has values in the slice that are not finite.
    """
    return cut_axial_slice(path, position).pixels


def cut_axial_slice(
    path: str | Path, position: Position = "center", verify: bool = False
) -> AxialSlice:
    """Read a slice as `read_axial_slice` does, with its place in the volume.

    With `verify`, a gzipped file is inflated to its end, at about twice the time, and VolumeError
    raised if its checksum is wrong.
    """
    with _open(path) as volume:
        axes = _display_axes(path, volume.header)
        axis, flipped = axes[2]
        count = volume.header.get_data_shape()[axis]
        index = slice_index(count, position)
        with _refusing(path, "damaged data", "a whole NIfTI volume"):
            pixels = _read_slice(volume, axis, count - 1 - index if flipped else index)
            if verify or not volume.complete:
                _read_to_end(volume)
    if not np.isfinite(pixels).all():
        found = f"NaN or infinity in slice {index}"
        raise _problem(path, found, "finite values", "fetch or convert it again")
    return AxialSlice(_display(pixels, axes), index, count)


def check_header(path: str | Path) -> int:
    """Return the number of axial slices; raises VolumeError if the header shows none to cut."""
    with _open(path) as volume:
        axis, _ = _display_axes(path, volume.header)[2]
        return volume.header.get_data_shape()[axis]


def plane_fault(rows: int, columns: int) -> str:
    """Return why no axial slice of a chest has this size, or an empty string."""
    fits = min(rows, columns) >= MIN_SIDE and max(rows, columns) <= OBLONG * min(rows, columns)
    return "" if fits else f"an axial plane of {columns} x {rows} px"


def slice_index(count: int, position: Position) -> int:
    """Return which of `count` slices, from 0, lies at `position`: 0 is the first, 1 the last."""
    return count // 2 if position == "center" else round(position * (count - 1))


def to_grey(pixels: np.ndarray, normalize: Literal["minmax", "window"]) -> np.ndarray:
    """Map Hounsfield units (any shape) to uint8: the slice's own range, or the lung window.

    Padding is raised to air first; min-max over it would squeeze the lungs into a few grey levels.
    Raises ValueError if the result is constant, if negative values were stored without their sign,
    and if the window finds no air: then these are no Hounsfield units.
    """
    values = f"values from {pixels.min():g} to {pixels.max():g}"
    if np.mean(pixels >= UNSIGNED) > A_FEW:
        raise ValueError(f"{values}: negative Hounsfield units without their sign")
    pixels = np.maximum(pixels, AIR)
    if normalize == "window" and np.mean((pixels > AIR) & (pixels < AERATED)) < A_FEW:
        raise ValueError(f"{values}, without air and lungs: no Hounsfield units")
    low, high = (pixels.min(), pixels.max()) if normalize == "minmax" else LUNG_WINDOW
    return scale(pixels, low, high)


def scale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values from `low` to `high` to 0 to 255, uint8; values beyond them are clipped.

    Raises ValueError if the result is constant.
    """
    grey = np.round((np.clip(pixels, low, high) - low) / max(high - low, 1e-300) * 255)
    if grey.min() == grey.max():
        raise ValueError(f"a constant picture (values from {pixels.min():g} to {pixels.max():g})")
    return grey.astype(np.uint8)


@dataclass(frozen=True)
class _Volume:
    """An open volume: a stream of its bytes, inflated, of which the header promises ``due``.

    ``complete``: the length of the file, or the one that gzip states at its end, is the promised
    one. A truncated file states another, and so does one of several gzip members: inflating it to
    the end tells them apart.
    """

    stream: BinaryIO
    header: nib.Nifti1Header
    due: int
    complete: bool


@contextmanager
def _open(path: str | Path) -> Iterator[_Volume]:
    """Open a volume, if its header and the length of the file allow that it holds slices."""
    with ExitStack() as stack:
        with _refusing(path, "no readable volume", "a NIfTI file"):
            file = stack.enter_context(open(path, "rb"))
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC  # whatever the file is called
            length = _stated_length(file, packed)
            stream = igzip.open(file) if packed else file
            header = _read_header(stream)
            _check(path, header)
            values = math.prod(header.get_data_shape())
            due = header.get_data_offset() + values * header.get_data_dtype().itemsize
        if not packed and length < due:
            found = f"damaged data ({length:,} of {due:,} bytes)"
            raise _problem(path, found, "a whole NIfTI volume", "fetch the file again")
        yield _Volume(stream, header, due, not packed or length == due % 2**32)


def _stated_length(file: BinaryIO, packed: bool) -> int:
    """Return a file's length or, if gzipped, the one that its last four bytes state, mod 2**32."""
    length = file.seek(0, os.SEEK_END)
    if packed:
        file.seek(max(0, length - 4))
        length = int.from_bytes(file.read(), "little")
    file.seek(0)
    return length


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    start = stream.read(nib.Nifti2Header.sizeof_hdr)
    kind = nib.Nifti2Header if start[:4] in NIFTI2_SIZES else nib.Nifti1Header
    return kind(start[: kind.sizeof_hdr])


def _check(path: str | Path, header: nib.Nifti1Header) -> None:
    """Raise VolumeError if the header names no values in three dimensions."""
    dtype, shape = header.get_data_dtype(), header.get_data_shape()
    if dtype.kind not in "iuf":
        raise _problem(path, f"values of type {dtype}", "numbers", "convert it to grey")
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or any(n < 1 for n in shape[:3]):
        found = f"shape {'x'.join(map(str, shape))}"
        raise _problem(path, found, "three dimensions", "remove it or cut it")
    if header.get_data_offset() < header.sizeof_hdr:  # as in a pair of files, .hdr and .img
        raise _problem(path, "values inside the header", "values after it", "convert it again")
    *_, rows, columns = sorted(shape[:3])
    if rows * columns > MAX_PIXELS:
        found = f"slices of {columns} x {rows} px"
        raise _problem(path, found, f"at most {MAX_PIXELS:,} px", "remove it or cut it")


def _read_slice(volume: _Volume, axis: int, index: int) -> np.ndarray:
    """Read a slice across the array axis `axis`: float64, its two axes in the file's order.

    The first axis runs fastest in the file: a slice across the last axis is one piece of it. Any
    other slice has one row in each plane across the last axis; the planes are read one by one, so
    that memory holds one of them beside the slice.
    """
    values = ArrayProxy(volume.stream, volume.header)
    shape, more = values.shape[:3], [0] * (len(values.shape) - 3)
    if axis == 2:
        return np.asarray(values[:, :, index, *more], np.float64)
    pixels = np.empty((shape[1 - axis], shape[2]))
    for k in range(shape[2]):
        pixels[:, k] = values[:, :, k, *more].take(index, axis)
    return pixels


def _read_to_end(volume: _Volume) -> None:
    """Inflate the rest, which raises if a checksum or the length is wrong."""
    while volume.stream.read(CHUNK):
        pass
    found = volume.stream.tell()
    if found < volume.due:
        raise ValueError(f"{found:,} of {volume.due:,} bytes")


@contextmanager
def _refusing(path: str | Path, found: str, expected: str) -> Iterator[None]:
    """Turn whatever nibabel and the decompressor raise on a damaged file into a VolumeError."""
    try:
        yield
    except VolumeError:
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file", "a volume", "fetch it") from None
    except Exception as error:  # they raise many kinds
        raise _problem(path, f"{found} ({error})", expected, "fetch the file again") from None


def _display_axes(path: str | Path, header: nib.Nifti1Header) -> list[tuple[int, bool]]:
    """Return which array axis, and whether flipped, gives columns, rows and slices.

    Columns run to the patient's left, rows to posterior, slices to superior.
    """
    with _refusing(path, "an affine that cannot be read", "an invertible affine"):
        affine = header.get_best_affine()
        forms = [form for form, code in (header.get_qform(True), header.get_sform(True)) if code]
        codes = {nib.aff2axcodes(form) for form in forms}
    found = "two orientations: sform and qform contradict each other" if len(codes) > 1 else ""
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        found = "an affine that names no axes"
    elif not forms or np.array_equal(affine, np.eye(4)):
        found = "an affine that says nothing (identity, or sform and qform both off)"
    if found:
        raise _problem(path, found, "one orientation", "repair its header, or convert it again")
    world = nib.io_orientation(affine)  # for each array axis: the nearest of RAS, and its direction
    towards = (-1, -1, 1)  # left, posterior, superior, in RAS
    array_axis = {int(axis): (i, direction) for i, (axis, direction) in enumerate(world)}
    axes = [(array_axis[axis][0], array_axis[axis][1] != towards[axis]) for axis in range(3)]
    columns, rows = (header.get_data_shape()[axis] for axis, _ in axes[:2])
    if fault := plane_fault(rows, columns):
        raise _problem(path, fault, "an axial slice of a chest", "look at it; leave it out")
    return axes


def _display(pixels: np.ndarray, axes: list[tuple[int, bool]]) -> np.ndarray:
    """Turn a slice whose two axes are in the file's order to rows and columns of the display."""
    (column_axis, column_flip), (row_axis, row_flip), _ = axes
    picture = pixels if row_axis < column_axis else pixels.T
    picture = picture[::-1] if row_flip else picture
    return np.ascontiguousarray(picture[:, ::-1] if column_flip else picture)


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> VolumeError:
    return VolumeError(Problem(path, found, expected, remedy))
