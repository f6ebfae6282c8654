"""Parts of an image that shortcut probes leave visible.

G. Maguolo and L. Nanni, "A critic evaluation of methods for COVID-19 automatic detection from X-ray
images" (2020, arXiv:2004.12823), blackened the centre of X-rays and found that a network still told
the collections apart.
"""

import numpy as np

VISIBLE = ("everything", "lungs", "no_lungs", "border")
VISIBLE_NAMES = {
    "everything": "Whole image",
    "lungs": "Lungs only",
    "no_lungs": "Lungs hidden",
    "border": "Border only",
}
BORDER = 16 / 224  # width of the frame as a share of the image's side
# Rectangle that holds the lungs of most centre slices and frontal films, as shares of the side:
# rows (top, bottom) and columns (left, right).
LUNG_ROWS = (0.15, 0.85)
LUNG_COLUMNS = (0.10, 0.90)


def visible_region(name: str, side: int, lungs: np.ndarray | None = None) -> np.ndarray:
    """Return the visible pixels of an image of `side` px: bool, (side, side).

    `lungs` is a lung mask, bool, (..., side, side); the result then has its shape. Without one, a
    rectangle stands for the lungs. Raises KeyError if `name` is not in VISIBLE.
    """
    if name in ("everything", "border"):
        region = np.ones((side, side), bool)
        if name == "border":
            width = max(1, round(BORDER * side))
            region[width : side - width, width : side - width] = False
        return region
    lungs = _rectangle(side) if lungs is None else lungs.astype(bool)
    return {"lungs": lungs, "no_lungs": ~lungs}[name]


def _rectangle(side: int) -> np.ndarray:
    region = np.zeros((side, side), bool)
    (top, bottom), (left, right) = (
        (round(low * side), round(high * side)) for low, high in (LUNG_ROWS, LUNG_COLUMNS)
    )
    region[top:bottom, left:right] = True
    return region
