"""The one reader of PNG and JPEG files: decode to grey, check, hash, resize."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chest.core.errors import FileError, Problem
from chest.core.parallel import parallel_map

ENDINGS = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # what a file holds counts, not its ending
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; the X-rays have about 3,000 px a side
JPEG_END = b"\xff\xd9"


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

    Colour becomes luminance, 16 bits become 8 by their full range, transparency lies on black,
    EXIF rotation is applied. The resize is that of `resize_grey`.

    Raises PictureError if the file is missing, no PNG or JPEG, damaged, animated, larger than 64
    megapixels, or of a single grey value. Damage in the middle of a JPEG, which has no checksum,
    goes unnoticed.
    """
    grey = _decode(path)
    low, high = grey.getextrema()
    if low == high:
        raise _problem(path, "one grey value everywhere", "a picture", "fetch it again")
    digest = hashlib.sha256(f"{grey.width}x{grey.height}:".encode())
    digest.update(grey.tobytes())
    pixels = {side: resize_grey(grey, side) for side in sides}
    return Picture(pixels, grey.width, grey.height, digest.hexdigest()[:32])


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


def _decode(path: str | Path) -> Image.Image:
    """Return the picture in mode L."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(path, image)
            start = image.fp.tell()  # of a JPEG's data: thumbnails before it have ends too
            image.load()
            if image.format == "JPEG" and JPEG_END not in Path(path).read_bytes()[start:]:
                raise ValueError("no end mark")
            ImageOps.exif_transpose(image, in_place=True)
            return _to_grey(image)
    except PictureError:
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file", "a picture", "fetch it") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        found, expected = f"no readable picture ({error})", "a whole PNG or JPEG"
        raise _problem(path, found, expected, "fetch the file again") from None


def _check(path: str | Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        found = f"{image.width} x {image.height} px"
        raise _problem(path, found, "at most 64 megapixels", "shrink it")
    if getattr(image, "n_frames", 1) > 1:
        found = f"{image.n_frames} frames"
        raise _problem(path, found, "one picture", "save one frame of it")


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image if image.mode == "L" else image.convert("L")


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> PictureError:
    return PictureError(Problem(path, found, expected, remedy))
