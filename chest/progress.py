"""How long work is shown, and over how many workers it is spread."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(
    things: Iterable, unit: str, total: int | None = None, silent: bool = False
) -> Iterable:
    """`things` behind a progress bar with a rate; silent when the output is no terminal."""
    return tqdm(
        things, unit=f" {unit}", total=total, disable=silent or not sys.stderr.isatty(), leave=False
    )


def workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
