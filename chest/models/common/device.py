"""Device and precision that models run with, and the description of a run."""

import errno
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import PreTrainedModel

from chest.models.common.checkpoints import Source

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")

Precision = Literal["auto", "fp32", "fp64", "bf16"]


def start(seed: int | None, precision: Precision = "auto") -> Accelerator:
    """Choose the device (CUDA if there is one, else CPU) and precision; seed all generators.

    ``auto`` is bf16 mixed precision on a GPU that has bf16 in hardware, else fp32. With ``fp64``
    results agree between processors far beyond the digits that are written; `float_type` then is
    float64. Under ``accelerate launch`` each process gets a device of its own.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if precision == "auto":
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    mixed = "bf16" if precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=not cuda)
    accelerator.float_type = torch.float64 if precision == "fp64" else torch.float32
    if seed is not None:
        set_seed(seed)
    return accelerator


def float_type(accelerator: Accelerator) -> torch.dtype:
    """Return the type of weights, pixels and logits: float64 for fp64, else float32."""
    return accelerator.float_type


def precision_name(accelerator: Accelerator) -> str:
    """Return fp32, fp64 or bf16."""
    if accelerator.mixed_precision == "bf16":
        return "bf16"
    return "fp64" if float_type(accelerator) == torch.float64 else "fp32"


def device_name(accelerator: Accelerator) -> str:
    """Return the name of the GPU, or ``CPU (<processor model>)``."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"CPU ({processor_name()})"


def processor_name() -> str:
    """Return the processor's model, or its architecture if the system does not give the model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_run(
    accelerator: Accelerator, source: Source, model: PreTrainedModel, seed: int | None
) -> dict:
    """Return the fields of a predictions record that say how `model` ran.

    They hold no time and no path of the machine: the same run gives the same record.
    """
    return {
        "weights": "random" if getattr(model.config, "random_weights", False) else "pretrained",
        "seed": seed,
        "checkpoint": source.checkpoint,
        "revision": source.revision,
        "commit": source.commit,
        "device": device_name(accelerator),
        "processes": accelerator.num_processes,
        "precision": precision_name(accelerator),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python (major and minor) and of the libraries that compute."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{library: version(library) for library in LIBRARIES}}


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn the SafetensorError of a full disk into an OSError that names `folder`."""
    try:
        yield
    except SafetensorError as error:
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(folder)) from error
