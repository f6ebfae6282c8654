"""Time two ways to do the same, in turn, and describe the machine."""

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from chest.core.parallel import workers
from chest.models.common.device import processor_name

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "nibabel", "isal", "pillow")


@dataclass(frozen=True)
class Row:
    """One comparison: seconds per ``unit``, of which ours had ``n``, for each repetition.

    ``theirs`` is what people use today, named by ``opponent``; ``note``: what else was measured.
    """

    name: str
    opponent: str
    n: int
    unit: str
    ours: list[float]
    theirs: list[float]
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as long theirs takes: the median over pairs."""
        return float(np.median(np.array(self.theirs) / np.array(self.ours)))


def time_in_turn(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    n: int,
    n_theirs: int | None = None,
) -> tuple[list[float], list[float]]:
    """Return the seconds per unit of `n` (theirs: of `n_theirs`) units, `repeats` times.

    The two alternate, so that a slow moment of the machine meets both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(seconds(ours) / n)
        times[1].append(seconds(theirs) / (n_theirs or n))
    return times


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes, the device's work included."""
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def peak_memory(function: Callable[[], object]) -> str:
    """Call `function` and say how much of the GPU's memory it took; nothing without a GPU."""
    if not torch.cuda.is_available():
        function()
        return ""
    gc.collect()  # models that are prepared refer to themselves
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    wait()
    return f"peak {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """Return the GPU's name, or the processor's with the cores that may be used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {workers()} cores"


def commit(root: Path) -> str:
    """Return the commit of the working tree, marked if it has changes."""
    describe = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


def circumstances(root: Path) -> dict:
    """Return commit, device, memory and versions, for a results file."""
    return {
        "commit": commit(root),
        "device": device(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
