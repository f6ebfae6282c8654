"""One loader for every picture: decode to grey, check, hash, resize."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chest.errors import ChestError, Problem

ENDINGS = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; the X-rays have about 3,000 px a side
FORMATS = ("PNG", "JPEG")


class ImageError(ChestError):
    """A picture that cannot be used; ``problem`` says why."""

    def __init__(self, problem: Problem):
        self.problem = problem
        super().__init__(str(problem))


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
    digest = hashlib.sha256(f"{grey.width}x{grey.height}:".encode() + grey.tobytes())
    return Grey(resize_grey(grey, side), grey.width, grey.height, digest.hexdigest()[:32])


def resize_grey(grey: Image.Image, side: int) -> np.ndarray:
    """The picture `grey` (mode L) as uint8, side x side: as read_grey resizes a file's."""
    return np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))


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
            return _to_grey(ImageOps.exif_transpose(image))
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
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert("L")


def _problem(path: str | Path, found: str, expected: str, remedy: str) -> ImageError:
    return ImageError(Problem(path, found, expected, remedy))
