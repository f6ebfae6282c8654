"""Errors of the device, told as such: too little memory, or a GPU that PyTorch has no code for."""

import os

import torch
from accelerate.utils.memory import should_reduce_batch_size

FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that the device's memory is full.

    PyTorch raises OutOfMemoryError for its own allocations only; those of the driver, of cuBLAS and
    of cuDNN end as other RuntimeErrors.
    """
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(text in str(error) for text in FULL)


def is_foreign(error: BaseException) -> bool:
    """Return whether `error` says that this PyTorch was not built for the GPU."""
    return isinstance(error, RuntimeError) and "no kernel image" in str(error)


def explain(error: BaseException) -> str | None:
    """Return what a user can do about an error of the device; None for any other error."""
    if is_out_of_memory(error):
        return (
            f"out of memory: {describe_memory()}; lower batch_size or image_size, name a smaller"
            " checkpoint, or end what else runs there (python tools/plan.py estimates each stage)"
        )
    if is_foreign(error):
        built = ", ".join(torch.cuda.get_arch_list())
        major, minor = torch.cuda.get_device_capability()
        return (
            f"{torch.cuda.get_device_name()}: PyTorch {torch.__version__} has no code for it"
            f" (it is sm_{major}{minor}; built for {built}); install a build that has"
        )
    return None


def describe_memory() -> str:
    """Return the name of the device in use, and how much of its memory is free."""
    if torch.cuda.is_available():
        try:
            name = torch.cuda.get_device_name()
            free, total = torch.cuda.mem_get_info()
        except RuntimeError:
            return "the GPU has not even room for CUDA itself"
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = (page * os.sysconf(f"SC_{x}PHYS_PAGES") for x in ("AV", ""))
        name = "this machine"
    return f"{name} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
