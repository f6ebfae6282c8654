"""Work on all cores, and progress bars."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from joblib import Parallel, cpu_count, delayed
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def workers() -> int:
    """Return the number of cores that this process may use; LOKY_MAX_CPU_COUNT lowers it."""
    return cpu_count()


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Iterator[Result]:
    """Yield ``function(item)`` of each of `items`, in order, computed in `processes`.

    The default is one process per core; with one, everything runs in this process. Only a few items
    are in work at a time, so memory does not grow with their number.
    """
    count = min(processes or workers(), len(items))
    if count < 2:
        yield from map(function, items)
        return
    yield from Parallel(n_jobs=count, return_as="generator")(delayed(function)(i) for i in items)


def progress(
    items: Iterable[Item], unit: str, total: int | None = None, silent: bool = False
) -> Iterable[Item]:
    """Show a progress bar with a rate over `items`; none if the output is no terminal."""
    hidden = silent or not sys.stderr.isatty()
    return tqdm(items, unit=f" {unit}", total=total, disable=hidden, leave=False)
