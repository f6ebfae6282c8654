"""Parts of an image that shortcut probes leave visible.

G. Maguolo and L. Nanni, "A critic evaluation of methods for COVID-19 automatic detection from X-ray
images" (2020, arXiv:2004.12823), blackened the centre of X-rays and found that a network still told
the collections apart.
"""

import numpy as np

VISIBLE = ("everything", "lungs", "no_lungs", "border", "mask")
VISIBLE_NAMES = {
    "everything": "Whole image",
    "lungs": "Lungs only",
    "no_lungs": "Lungs hidden",
    "border": "Border only",
    "mask": "Shape of the lung mask",
}
BORDER = 0.08  # width of the frame as a share of the image's side


def visible_region(name: str, side: int, lungs: np.ndarray | None = None) -> np.ndarray:
    """Return the visible pixels of an image of `side` px: bool, (side, side).

    `lungs` is the lung mask, bool, (side, side), that all but the whole image and the border need.
    Raises KeyError if `name` is not in VISIBLE.
    """
    if name in ("everything", "border"):
        region = np.ones((side, side), bool)
        if name == "border":
            width = max(1, round(BORDER * side))
            region[width : side - width, width : side - width] = False
        return region
    return {"lungs": lungs, "no_lungs": ~lungs, "mask": lungs}[name]
