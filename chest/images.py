"""One loader for every picture: decode to grey, check, hash, resize."""

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import isal_zlib
from PIL import Image, ImageOps

from chest.errors import FileError, Problem
from chest.parallel import map_in_processes

ENDINGS = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; the X-rays have about 3,000 px a side
FORMATS = ("PNG", "JPEG")
MAX_JPEG = 2**28  # bytes up to its end mark: 64 megapixels hardly have more
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the header's colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # column, row and steps of each pass of an interlaced PNG  # fmt: skip
CHUNK = 2**18  # bytes that are inflated at a time to count them
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
    64 megapixels, or of one grey value only. A JPEG has no checksum: of one that has its end mark,
    damage in its middle goes unnoticed.
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
            scan = image.fp.tell()  # of a JPEG: where its first scan begins
            image.load()
            _check_whole(path, image, scan)
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


def _check_whole(path: str | Path, image: Image.Image, scan: int) -> None:
    """Raise ValueError where the file ends early without Pillow's noticing: it fills up with 0.

    `image` is as the file has it, and a JPEG's first scan begins at the byte `scan`.
    """
    with open(path, "rb") as file:
        if image.format == "JPEG":
            file.seek(scan)
            if file.read(MAX_JPEG).rfind(b"\xff\xd9") < 0:  # from behind it is found at once
                raise ValueError("no end mark")
        # Of a PNG the last line is lacking if any is; of an interlaced one, any may be.
        elif image.info.get("interlace") or not any(
            image.crop((0, image.height - 1, *image.size)).tobytes()
        ):
            due = _png_bytes(file.read(29))
            found = _inflated_bytes(file, due)
            if found < due:
                raise ValueError(f"{found:,} of {due:,} bytes")


def _png_bytes(start: bytes) -> int:
    """How many bytes the lines of a PNG have, each with one for its filter; `start`: to IHDR's end.

    The five values of the header: width and height in px, bits a channel, colour type, interlaced.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", start[16:])
    bits = depth * PNG_CHANNELS[colour]
    sizes = [
        (math.ceil((width - x) / dx), math.ceil((height - y) / dy))
        for x, y, dx, dy in (ADAM7 if interlaced else [(0, 0, 1, 1)])
    ]
    return sum(rows * (1 + math.ceil(columns * bits / 8)) for columns, rows in sizes if columns > 0)


def _inflated_bytes(file: BinaryIO, most: int) -> int:
    """How many bytes the data of a PNG become, counted no further than to `most`."""
    unpacker, count = isal_zlib.decompressobj(), 0
    for packed in _data_of_png(file):
        while packed and count < most:
            count += len(unpacker.decompress(packed, CHUNK))
            packed = unpacker.unconsumed_tail
    return count + len(unpacker.flush())


def _data_of_png(file: BinaryIO) -> Iterator[bytes]:
    """The packed data of a PNG piece by piece; `file` has been read to the header's end."""
    length = 0
    while file.seek(length + 4, 1) and len(head := file.read(8)) == 8:  # 4: a chunk's checksum
        length, kind = struct.unpack(">I4s", head)
        while kind == b"IDAT" and (packed := file.read(min(length, CHUNK))):
            length -= len(packed)
            yield packed


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
