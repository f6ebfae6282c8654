"""Axial slices of NIfTI volumes, as a radiologist looks at them."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy

from chest.errors import FileError, Problem

# What nibabel would say of a bad header goes into one message of ours.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

LUNG_WINDOW = (-1000.0, 400.0)  # Hounsfield units
GZIP_MAGIC = b"\x1f\x8b"
GZIP_LIMIT = 1032  # bytes out of one: a match of 258 takes two bits at least (zlib's manual)
MAX_PIXELS = 4096 * 4096  # of a slice; CT has 512 x 512, and each becomes 8 bytes
CHUNK = 256 * 1024  # bytes that are inflated at a time for their checksum alone
NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # of the header, 540, in both byte orders


class VolumeError(FileError):
    """A volume from which no slice can be cut."""


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

    Fast: the file is inflated as far as the slice and no further, so its checksum, at its end, is
    not tested. A truncated file is noticed all the same, a flipped bit before the slice need not
    be: cut_axial_slice with `verify` notices it.

    Raises VolumeError where the file is missing, truncated, no NIfTI volume, shorter than its
    header says, not of three dimensions (a fourth of length 1 is dropped), or the slice holds
    values that are not finite.
    """
    return cut_axial_slice(path, position).pixels


def cut_axial_slice(
    path: str | Path, position: Literal["center"] | float = "center", verify: bool = False
) -> AxialSlice:
    """As read_axial_slice, with the slice's place in the volume.

    With `verify` a gzipped file is inflated to its end, and VolumeError raised where its checksum
    is wrong: about twice the time.
    """
    with _opened(path) as volume:
        axes = _display_axes(path, volume.header)
        axis, flipped = axes[2]
        count = volume.header.get_data_shape()[axis]
        index = slice_index(count, position)
        pixels = _read_slice(volume, axis, count - 1 - index if flipped else index)
        if verify or not volume.complete:
            _read_to_end(volume)
    if not np.isfinite(pixels).all():
        raise _problem(
            path, f"NaN or infinity in slice {index}", "finite values", "fetch or convert it again"
        )
    return AxialSlice(_display(pixels, axes), index, count)


def check_header(path: str | Path) -> None:
    """Raise VolumeError where header and length of `path` show that no slice can be cut."""
    with _opened(path) as volume:
        _display_axes(path, volume.header)


def slice_index(count: int, position: Literal["center"] | float) -> int:
    """Which of `count` slices, from 0, lies at `position`: from 0, the first, to 1, the last.

    Raises ValueError where `position` is neither "center" nor from 0 to 1.
    """
    if position == "center":
        return count // 2
    if not 0 <= position <= 1:
        raise ValueError(f"the position {position} is not from 0 to 1")
    return round(position * (count - 1))


def to_grey(pixels: np.ndarray, normalize: Literal["minmax", "window"]) -> np.ndarray:
    """Map slice values (any shape) to uint8: the slice's own range, or the lung window, to 0–255.

    Raises ValueError where the slice is constant, since it shows nothing.
    """
    low, high = (pixels.min(), pixels.max()) if normalize == "minmax" else LUNG_WINDOW
    grey = (np.clip(pixels, low, high) - low) / (high - low) if high > low else np.zeros(1)
    if grey.min() == grey.max():
        raise ValueError(f"a constant slice (from {pixels.min():g} to {pixels.max():g})")
    return np.round(grey * 255).astype(np.uint8)


@dataclass(frozen=True)
class _Volume:
    """An open volume: a stream of its bytes, inflated, of which the header promises `due`.

    ``complete``: the file says itself that it holds them, no more and no less. A gzipped one of
    several members does not, nor does a truncated one: only its end tells them apart.
    """

    stream: BinaryIO
    header: nib.Nifti1Header
    due: int
    complete: bool


@contextmanager
def _opened(path: str | Path) -> Iterator[_Volume]:
    """The volume, once its header and the length of the file allow that it holds slices."""
    with _refusing(path, "no readable volume", "a NIfTI file"), open(path, "rb") as file:
        packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC  # whatever the file is called
        stream = igzip.open(file) if packed else file
        length, stated = _lengths(file)
        header = _read_header(stream)
        _check(path, header)
        values = math.prod(header.get_data_shape())
        due = header.get_data_offset() + values * header.get_data_dtype().itemsize
        most = length * GZIP_LIMIT if packed else length
        if due > most:  # before any of it is allocated
            raise _problem(
                path, f"damaged data (at most {most:,} of {due:,} bytes)", "a whole NIfTI volume",
                "fetch the file again",
            )  # fmt: skip
        *_, rows, columns = sorted(header.get_data_shape()[:3])
        if rows * columns > MAX_PIXELS:
            raise _problem(
                path, f"slices of {columns} x {rows} px", f"at most {MAX_PIXELS:,} px",
                "remove it or cut it",
            )  # fmt: skip
        with _refusing(path, "damaged data", "a whole NIfTI volume"):
            yield _Volume(stream, header, due, not packed or stated == due % 2**32)


def _lengths(file: BinaryIO) -> tuple[int, int]:
    """A file's length in bytes and, if it is gzipped, its last member's, inflated, modulo 2**32.

    The file is put back to its start.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - 4))
    stated = int.from_bytes(file.read(), "little")
    file.seek(0)
    return length, stated


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    start = stream.read(nib.Nifti2Header.sizeof_hdr)
    kind = nib.Nifti2Header if start[:4] in NIFTI2_SIZES else nib.Nifti1Header
    return kind(start[: kind.sizeof_hdr])


def _check(path: str | Path, header: nib.Nifti1Header) -> None:
    """Raise VolumeError where the header names no values in three dimensions."""
    dtype, shape = header.get_data_dtype(), header.get_data_shape()
    if dtype.kind not in "iuf":
        raise _problem(path, f"values of type {dtype}", "numbers", "convert it to grey")
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or any(n < 1 for n in shape[:3]):
        raise _problem(
            path, f"shape {'x'.join(map(str, shape))}", "three dimensions", "remove it or cut it"
        )
    if header.get_data_offset() < header.sizeof_hdr:  # as in a pair of files, .hdr and .img
        raise _problem(path, "values inside the header", "values after it", "convert it again")


def _read_slice(volume: _Volume, axis: int, index: int) -> np.ndarray:
    """One slice across the array axis `axis`, float64, its two axes in the file's order.

    nibabel seeks, reads and scales. Values lie in the file with the first axis running fastest:
    a slice across the last axis is one piece of it. Of any other, each plane across the last axis
    holds one row: they pass one by one, so that memory holds one of them beside the slice.
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
    """Inflate what is left, for gzip's checksums; raises where they or the length are wrong."""
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
    """Which array axis, and whether flipped, gives columns, rows and slices.

    Columns run to the patient's left, rows to posterior, slices to superior.
    """
    affine = header.get_best_affine()
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
