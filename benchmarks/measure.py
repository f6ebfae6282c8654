"""Two ways to do the same, timed in turn, and what a figure must carry to be believed."""

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

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "nibabel", "isal", "pillow")


@dataclass(frozen=True)
class Row:
    """One comparison: seconds for each ``unit``, of which ours had ``n``; each time, in turn.

    ``theirs`` is what people use today, named by ``opponent``. ``note`` holds what else was
    measured.
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
        """How many times as long theirs takes: the median of the ratios, pair by pair."""
        return float(np.median(np.array(self.theirs) / np.array(self.ours)))


def time_in_turn(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    n: int,
    n_theirs: int | None = None,
) -> tuple[list[float], list[float]]:
    """Seconds for each of `n` units (theirs: of `n_theirs`), `repeats` times.

    They alternate: a slow moment of the machine meets both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(seconds(ours) / n)
        times[1].append(seconds(theirs) / (n_theirs or n))
    return times


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, the device's work included."""
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def peak_memory(function: Callable[[], object]) -> str:
    """Call it, and say how much of the GPU's memory it took; nothing without a GPU."""
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
    """Until the GPU, if there is one, has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """The GPU's name, or the processor's with the cores that may be used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def processor() -> str:
    """The processor's name, where the system tells it, with the cores that may be used."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit(root: Path) -> str:
    """The commit of the working tree, and whether it has changes."""
    describe = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


def circumstances(root: Path) -> dict:
    """Commit, device, memory and versions, for a results file."""
    return {
        "commit": commit(root),
        "device": device(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
