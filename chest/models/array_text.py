"""Small arrays as text, as the journal of finished images keeps them."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np


def to_text(array: np.ndarray) -> str:
    """Return the values of a uint8 array as text."""
    return base64.b64encode(zlib.compress(array.tobytes())).decode("ascii")


def from_text(text: str, shape: Sequence[int]) -> np.ndarray:
    """Return the uint8 array of `shape` that `to_text` wrote."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)
