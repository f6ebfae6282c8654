"""One loader for every picture: decode to grey, check, hash, resize."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chest.errors import FileError, Problem
from chest.parallel import map_in_processes

ENDINGS = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; the X-rays have about 3,000 px a side
FORMATS = ("PNG", "JPEG")
BATCH = 8  # pictures that a process decodes at a time: handed over singly they take a tenth longer


class ImageError(FileError):
    """A picture that cannot be used."""


@dataclass(frozen=True)
class Grey:
    """A decoded picture: ``pixels`` (side x side, uint8), its own size in px, and its hash."""

    pixels: np.ndarray
    width: int
    height: int
    pixel_hash: str


def read_grey(path: str | Path, side: int) -> Grey:
    """Decode the PNG or JPEG file `path` and resize it to `side` x `side` px.

    Colour becomes luminance, 16 bits become 8 by their full range, transparency lies on black,
    EXIF rotation is applied. The resize is bicubic with antialiasing and does not keep the aspect
    ratio, as in SigLIP's own preprocessing. ``pixel_hash`` is of the picture before the resize.

    Raises ImageError where the file is missing, no PNG or JPEG, damaged, animated, larger than
    64 megapixels, or of one grey value only.
    """
    grey = _decode(path)
    if grey.getextrema()[0] == grey.getextrema()[1]:
        raise _problem(
            path, "one grey value in all pixels", "a picture", "remove it or fetch it again"
        )
    digest = hashlib.sha256(f"{grey.width}x{grey.height}:".encode())
    digest.update(grey.tobytes())
    return Grey(resize_grey(grey, side), grey.width, grey.height, digest.hexdigest()[:32])


def read_greys(
    paths: Sequence[str | Path], side: int, processes: int | None = None
) -> Iterator[Grey | Problem]:
    """read_grey of each of `paths`, in their order, on all cores; what is no picture is a Problem.

    `processes` work at it (default: one a core), a few batches ahead of the reader, so memory does
    not grow with the number of paths. Threads would wait for Python's lock between what Pillow does
    without it: on two cores, two are 1.6 to 1.8 times as fast as one, processes 1.9 times. Close
    the iterator where it is left early.

    Raises ChestError where the system ended one of the processes.
    """
    batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    with closing(map_in_processes(partial(_read_batch, side=side), batches, processes)) as read:
        for batch in read:
            yield from batch


def resize_grey(grey: Image.Image, side: int) -> np.ndarray:
    """The picture `grey` (mode L) as uint8, side x side: as read_grey resizes a file's."""
    # A picture of six times the side or more is first shrunk by averaging whole blocks, to no less
    # than three times: of X-rays of 3,000 px that takes a sixth of the time (4 ms, not 25), and no
    # pixel of real ones is more than 2 of 255 from plain bicubic, 84 of 100 are the same. A gap of
    # 2 is no faster and shows fine lines as stripes; Lanczos is slower, box and bilinear are off by
    # up to 43 and 27.
    return np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _read_batch(paths: Sequence[str | Path], side: int) -> list[Grey | Problem]:
    greys: list[Grey | Problem] = []
    for path in paths:
        try:
            greys.append(read_grey(path, side))
        except ImageError as error:
            greys.append(error.problem)
    return greys


def _decode(path: str | Path) -> Image.Image:
    """The picture in mode L."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _problem(
                    path, f"{image.width} x {image.height} px", "at most 64 megapixels", "shrink it"
                )
            if getattr(image, "n_frames", 1) > 1:
                raise _problem(
                    path, f"{image.n_frames} frames", "one picture", "save one frame of it"
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_grey(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file", "a picture", "fetch it") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise _problem(
            path, f"no readable picture ({error})", "a whole PNG or JPEG", "fetch the file again"
        ) from None


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        deep = np.asarray(image)
        grey = np.empty(deep.shape, np.uint8)
        for row, line in enumerate(deep):  # one by one: 64 megapixels as floats are half a GB
            grey[row] = np.round(line / 257)
        return Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image if image.mode == "L" else image.convert("L")


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> ImageError:
    return ImageError(Problem(path, found, expected, remedy))
