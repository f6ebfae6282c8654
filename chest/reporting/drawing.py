"""The style of charts and sheets of images: the same input gives the same bytes.

A pull request shows them 430 px wide, so they are 7 inches wide and no letter is below 11 points.
"""

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from chest.core.files import replacing

WIDTH, DPI = 7.0, 130  # inches; dots per inch
LINE = 0.2  # height of a line of text in inches
# Okabe and Ito's colours, which colour-blind people tell apart, without those too pale for white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#767676"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "xtick.color": "0.6",
    "xtick.labelcolor": "black",
    "ytick.color": "0.6",
    "ytick.labelcolor": "black",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.labelsize": 11,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a hospital's name is no formula
}


@contextmanager
def drawing(
    path: Path, height: float, title: str = "", note: str = "", width: float = WIDTH
) -> Iterator[Figure]:
    """Yield a figure of `width` x `height` inches in the common style; save it to `path`."""
    # The user's own matplotlib style must not change the bytes, nor the library's version.
    with matplotlib.style.context(["default", STYLE]):
        title, note = wrap(title, round(8.5 * width)), wrap(note, round(10.5 * width))
        height += LINE * (title + note).count("\n")
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", color="0.3")
        yield figure
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})


def percent_tick(share: float, _: int) -> str:
    return f"{100 * share:g} %"


def wrap(text: str, width: int) -> str:
    """Break lines longer than `width` letters; a long name breaks before its last bracket."""
    if len(text) > width and text.endswith(")"):
        text = text.replace(" (", "\n(")
    lines = (textwrap.wrap(line, width, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join("\n".join(line) for line in lines)


def count_lines(texts: Iterable[str]) -> int:
    """Return the number of lines of the longest of `texts`."""
    return max((text.count("\n") + 1 for text in texts), default=0)
