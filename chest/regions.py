"""Which part of an image each probe leaves visible; the rest is black.

After G. Maguolo and L. Nanni, "A critic evaluation of methods for COVID-19 automatic detection from
X-ray images" (2020, arXiv:2004.12823), who blackened the centre of X-rays and found that a network
still told the collections apart. The regions are fixed, in shares of the side, for CT slices and
X-rays alike: no segmentation.
"""

import numpy as np

LUNGS = (0.15, 0.85, 0.10, 0.90)  # top, bottom, left, right of the rectangle that holds the lungs
HIDDEN = 0.0  # grey of what is hidden, from 0 to 1
BORDER = 0.08  # width of the frame that is outside the body, or nearly so


def visible_region(probe: str, side: int) -> np.ndarray:
    """Which pixels a probe leaves visible, bool (side, side).

    ``lungs_only`` shows the lungs' rectangle, ``lungs_hidden`` all but that, ``border_only`` a
    frame of 8 % of the side.
    """
    if probe == "border_only":
        return ~_rectangle(side, BORDER, 1 - BORDER, BORDER, 1 - BORDER)
    lungs = _rectangle(side, *LUNGS)
    return lungs if probe == "lungs_only" else ~lungs


def _rectangle(side: int, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    line = (np.arange(side) + 0.5) / side
    rows, columns = (line > top) & (line < bottom), (line > left) & (line < right)
    return rows[:, None] & columns
