"""The GPU, or a stand-in for one: CPU tensors tagged as on the device, with the rules of CUDA.

To be imported before what uses PyTorch. What the stand-in does not do itself is added here.
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.utils import _foreach_utils

FAKE = not torch.cuda.is_available()
SHARED = Path(__file__).resolve().parents[3] / "shared"


def flatten(tree: object) -> tuple[list, None]:
    """Return the leaves of nested lists, tuples and dicts, as far as operators have them."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return [tree], None
    return [leaf for part in tree for leaf in flatten(part)[0]], None


if FAKE:
    sys.path.append(str(SHARED / "fake-cuda"))
    import fakecuda

    fakecuda.install(bf16=True)
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_reserved = lambda *_: 0
    fakecuda.tree_flatten = flatten  # PyTorch's own takes a third of the time
    grouping = _foreach_utils._group_tensors_by_device_and_dtype

    def group(lists: list[list[torch.Tensor]], with_indices: bool = False) -> dict:
        """Group as PyTorch does, which sees the device of a tagged tensor as the CPU."""
        found = grouping(lists, with_indices)
        cuda = fakecuda.tagged(lists[0][0])
        return {(fakecuda.CUDA if cuda else d, kind): x for (d, kind), x in found.items()}

    clip_grad._group_tensors_by_device_and_dtype = group
    Optimizer._group_tensors_by_device_and_dtype = staticmethod(group)


def on_device() -> ExitStack:
    """Return a context in which CUDA's rules hold."""
    stack = ExitStack()
    if FAKE:
        stack.enter_context(fakecuda.Dispatch())
        stack.enter_context(fakecuda.Functions())
    return stack


def waits(function: Callable, *arguments) -> int:
    """Return how often the host waited for the device in a call; copies to it count as well."""
    if FAKE:
        before = fakecuda.SYNCS.copy()
        function(*arguments)
        found = fakecuda.SYNCS - before
        print(found, file=sys.stderr)
        return found.total()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    print([f"{warning.filename}:{warning.lineno}" for warning in found], file=sys.stderr)
    return len(found)
