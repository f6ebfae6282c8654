"""The one reader of PNG and JPEG files: decode to grey, check, hash, resize."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from chest.core.errors import FileError, Problem
from chest.core.parallel import parallel_map

ENDINGS = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # what a file holds counts, not its ending
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; the X-rays have about 3,000 px a side
JPEG_END = b"\xff\xd9"
DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors and scanners have
# What a picture of a chest must show. Of 2,156 real ones none has fewer than 82 grey values, a
# spread of less than 20 levels, or more than 65 % at one end.
MIN_LEVELS, MIN_SPREAD = 40, 10  # the spread is from the 1st to the 99th percentile
AT_END, MAX_AT_END = 3, 0.9  # grey levels that count as black, or white; the share of them
LOOK = "look at it: it may be a mask, or of a wrong window, depth or offset"


class PictureError(FileError):
    """A picture that cannot be used."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    ``pixels``: uint8, (side, side), for each side that was asked for. ``width`` and ``height``: of
    the file, in px. ``pixel_hash``: of the grey picture before it was resized.
    """

    pixels: dict[int, np.ndarray]
    width: int
    height: int
    pixel_hash: str


def read_picture(path: str | Path, sides: Sequence[int]) -> Picture:
    """Decode the PNG or JPEG file `path` once and resize it to each of `sides`, in px.

    Colour becomes luminance, transparency lies on black, EXIF rotation is applied. 16-bit grey
    becomes 8-bit by the depth that its sBIT chunk states or that its values use: 8, 10, 12, 14 or
    16 bits. The resize is that of `fit`.

    Raises PictureError if the file is missing, no PNG or JPEG, damaged, animated, larger than 64
    megapixels, of 16-bit colours that use a quarter of their range, or shows no chest, as `fit`
    tells. Damage in the middle of a JPEG, which has no checksum, goes unnoticed.
    """
    grey = decode(path)
    digest = hashlib.sha256(f"{grey.width}x{grey.height}:".encode())
    digest.update(grey.tobytes())
    try:
        pixels = fit(grey, sides)
    except ValueError as error:
        raise _problem(path, str(error), "a picture of a chest", LOOK) from None
    return Picture(pixels, grey.width, grey.height, digest.hexdigest()[:32])


def fit(grey: Image.Image, sides: Sequence[int]) -> dict[int, np.ndarray]:
    """Resize a picture of mode L to uint8, (side, side), for each of `sides`; see `resize_grey`.

    This is what every picture passes before a model sees it. Raises ValueError if it shows no
    chest: a few grey values, as a mask or label map has, or, at the smallest of the sides, nearly
    all of it within a few grey levels, or black, or white.
    """
    values = sum(count > 0 for count in grey.histogram())
    if values == 1:
        raise ValueError("one grey value everywhere")
    pixels = {side: resize_grey(grey, side) for side in sides}
    smallest = pixels[min(pixels)]
    share = np.cumsum(np.bincount(smallest.ravel(), minlength=256)) / smallest.size
    low, high = np.searchsorted(share, (0.01, 0.99))
    if high - low < MIN_SPREAD:
        raise ValueError(f"nearly one grey value (98 % lie from {low} to {high} of 255)")
    for end, part in (("black", share[AT_END - 1]), ("white", 1 - share[-AT_END - 1])):
        if part > MAX_AT_END:
            raise ValueError(f"{part:.0%} of it {end}")
    if values < MIN_LEVELS:
        raise ValueError(f"only {values} grey values, as in a mask")
    return pixels


def read_pictures(
    paths: Sequence[str | Path], sides: Sequence[int], processes: int | None = None
) -> Iterator[Picture | Problem]:
    """Yield read_picture of each of `paths`, in order, on all cores; a Problem if it fails."""
    yield from parallel_map(partial(_read, sides=tuple(sides)), paths, processes)


def resize_grey(grey: Image.Image, side: int) -> np.ndarray:
    """Resize a picture of mode L to uint8, (side, side).

    Bicubic with antialiasing, not keeping the aspect ratio, as SigLIP's own preprocessing does.
    """
    # Six times the side or more is first shrunk by averaging whole blocks, to no less than three
    # times: for X-rays of 3,000 px that takes a sixth of the time, and pixels differ from plain
    # bicubic by at most 2 of 255.
    return np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _read(path: str | Path, sides: Sequence[int]) -> Picture | Problem:
    try:
        return read_picture(path, sides)
    except PictureError as error:
        return error.problem


def decode(path: str | Path) -> Image.Image:
    """Return the picture in mode L; raises PictureError as `read_picture` does."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            _check(path, image)
            start = file.tell()  # of a JPEG's data: thumbnails before it have ends too
            image.load()
            if image.format != "PNG" and JPEG_END not in Path(path).read_bytes()[start:]:
                raise ValueError("no end mark")
            chunks = _png_chunks(file) if image.format == "PNG" else {}
            ImageOps.exif_transpose(image, in_place=True)
            return _to_grey(path, image, chunks)
    except PictureError:
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file", "a picture", "fetch it") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        if isinstance(error, UnidentifiedImageError):  # whose text is of our file object
            error = "neither PNG nor JPEG, or damaged"
        found, expected = f"no readable picture ({error})", "a whole PNG or JPEG"
        raise _problem(path, found, expected, "fetch the file again") from None


def _check(path: str | Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        found = f"{image.width} x {image.height} px"
        raise _problem(path, found, "at most 64 megapixels", "shrink it")
    # An MPO is a JPEG with more behind it, as cameras write them; the first is the picture.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        found = f"{image.n_frames} frames"
        raise _problem(path, found, "one picture", "save one frame of it")


def _png_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """Return the chunks of a PNG that come before its pixels, by their names."""
    chunks, name = {}, b""
    file.seek(8)
    while name != b"IDAT":
        size, name = struct.unpack(">I4s", file.read(8))
        chunks[name] = file.read(size + 4)[:-4] if name != b"IDAT" else b""
    return chunks


def _to_grey(path: str | Path, image: Image.Image, chunks: dict[bytes, bytes]) -> Image.Image:
    if image.mode.startswith("I"):
        return _to_eight_bits(image, chunks)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    grey = image if image.mode == "L" else image.convert("L")
    # Of 16-bit colours Pillow keeps the upper eight bits, too few of a 12-bit picture.
    if chunks.get(b"IHDR", b"")[8:9] == b"\x10" and grey.getextrema()[1] < 64:
        found = "16-bit colours of which at most 14 bits are used"
        raise _problem(path, found, "8-bit colours, or grey", "convert it to grey")
    return grey


def _to_eight_bits(image: Image.Image, chunks: dict[bytes, bytes]) -> Image.Image:
    """Scale 16-bit grey by the depth in use. Pillow's own conversion clips it at 255."""
    deep = np.asarray(image).astype(np.uint32)
    if (clear := image.info.get("transparency")) is not None:
        deep[deep == clear] = 0
    stated, highest = tuple(chunks.get(b"sBIT", b"")[:1]), deep.max()
    depth = next(bits for bits in (*stated, *DEPTHS) if highest < 2**bits)
    top = np.uint32(2**depth - 1)
    return Image.fromarray(((deep * 255 + top // 2) // top).astype(np.uint8))


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> PictureError:
    return PictureError(Problem(path, found, expected, remedy))
