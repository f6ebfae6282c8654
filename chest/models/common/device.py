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

from chest.core import runtime
from chest.core.errors import ParameterError
from chest.models.common import memory
from chest.models.common.checkpoints import Source

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")

Precision = Literal["auto", "fp32", "fp64", "bf16", "fp16"]
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (7, 0)  # compute capability from which half precision is fast


def start(seed: int | None, precision: Precision = "auto") -> Accelerator:
    """Choose the device (CUDA if there is one, else CPU) and precision; seed all generators.

    ``auto`` is mixed precision on a GPU with tensor cores: bf16 if it has that in hardware, else
    fp16 with scaled gradients; fp32 elsewhere. With ``fp64`` results agree between processors far
    beyond the digits that are written; `float_type` then is float64. Under ``accelerate launch``
    each process gets a device of its own. Errors of the device end the stage with a message.

    Raises ParameterError for fp16 without a GPU.
    """
    if memory.explain not in runtime.explanations:
        runtime.explanations.append(memory.explain)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if precision == "auto":
        precision = _fastest() if cuda else "fp32"
    if precision == "fp16" and not cuda:
        raise ParameterError("precision: fp16 needs a GPU; bf16 and fp32 run on a CPU")
    mixed = precision if precision in MIXED else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=not cuda)
    accelerator.float_type = torch.float64 if precision == "fp64" else torch.float32
    if seed is not None:
        set_seed(seed)
    return accelerator


def _fastest() -> Precision:
    """Return the precision in which the GPU multiplies matrices fastest."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability() >= TENSOR_CORES else "fp32"


def float_type(accelerator: Accelerator) -> torch.dtype:
    """Return the type of weights, pixels and logits: float64 for fp64, else float32."""
    return accelerator.float_type


def frozen_type(accelerator: Accelerator) -> torch.dtype:
    """Return the type for weights that do not train: bf16 or fp16 if precision is mixed."""
    return MIXED.get(accelerator.mixed_precision, float_type(accelerator))


def precision_name(accelerator: Accelerator) -> str:
    """Return fp32, fp64, bf16 or fp16."""
    if accelerator.mixed_precision in MIXED:
        return accelerator.mixed_precision
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
