"""Where and how models run: one device, one precision, one way to share work between processes."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file

from chest.errors import ChestError, ParameterError

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")


class CheckpointError(ChestError):
    """A checkpoint that is missing, incomplete, or of another kind."""


def start(seed: int) -> Accelerator:
    """Choose the device (CUDA, else CPU) and the precision, and seed every generator.

    Matrix products run in bf16 where a CUDA device has it in hardware, else in fp32; weights stay
    as they were loaded. Under `accelerate launch` each process gets a device of its own.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    accelerator = Accelerator(mixed_precision="bf16" if native else "no", cpu=not cuda)
    set_seed(seed)
    return accelerator


@dataclass(frozen=True)
class Source:
    """Where weights come from; ``commit`` is what the revision named, None for a folder."""

    checkpoint: str
    revision: str
    commit: str | None

    def load(self, load: Callable, **arguments):
        """`load` (a from_pretrained) with this checkpoint; raises CheckpointError."""
        revision = self.commit or self.revision
        try:
            return load(self.checkpoint, revision=revision, **arguments)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"checkpoint {self}: {error}") from None

    def load_config(self, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
        """The configuration, as a `kind`; raises CheckpointError where it is another model's.

        Only config.json is fetched. transformers itself would take the sizes of a `kind` that the
        file does not name from its defaults.
        """
        content, _ = self.load(PreTrainedConfig.get_config_dict)
        found = content.get("model_type")
        if found != kind.model_type:
            raise CheckpointError(
                f"checkpoint {self}: it is a model of the kind {found}, but this stage reads"
                f" {kind.model_type}"
            )
        return self.load(kind.from_pretrained)

    def load_model(self, load: Callable, fresh: Sequence[str] = (), **arguments):
        """As `load`, with all weights from safetensors but `fresh`, which it need not have."""
        # Another shape is told below: transformers' own error names no weight.
        arguments |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        model, info = self.load(load, output_loading_info=True, **arguments)
        lacking = sorted(set(info["missing_keys"]) - set(fresh)) + sorted(
            key for key, *_ in info["mismatched_keys"]
        )
        if lacking:
            raise CheckpointError(
                f"checkpoint {self}: {len(lacking)} weights of {type(model).__name__} are not in it"
                f" or have another shape ({', '.join(lacking[:3])})"
            )
        return model

    def __str__(self) -> str:
        return f"{self.checkpoint} (revision {self.revision})"


def find_checkpoint(checkpoint: str, revision: str) -> Source:
    """A folder, or a repository of the Hugging Face hub at the commit that `revision` names now.

    The commit is resolved once, so that weights, tokenizer and preprocessor belong together.
    Raises CheckpointError where there is no such folder, or the hub has no such checkpoint.
    """
    if Path(checkpoint).is_dir():
        return Source(checkpoint, revision, None)
    source = Source(checkpoint, revision, None)
    if checkpoint.count("/") != 1 or checkpoint[0] in "./":
        raise CheckpointError(f"checkpoint {source}: no such folder, and no name of the hub")
    config = source.load(lambda name, **where: cached_file(name, "config.json", **where))
    return Source(checkpoint, revision, Path(config).parent.name)


def record(accelerator: Accelerator, source: Source, model, seed: int, n: int) -> dict:
    """What a result must carry to be believed: model, device, precision, n, seed, versions.

    Holds no time and no path of the machine: the same run gives the same record.
    """
    return {
        "checkpoint": source.checkpoint,
        "revision": source.revision,
        "commit": source.commit,
        "weights": "random" if getattr(model.config, "random_weights", False) else "pretrained",
        "n": n,
        "seed": seed,
        "device": device_name(accelerator),
        "processes": accelerator.num_processes,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def device_name(accelerator: Accelerator) -> str:
    """The GPU's name, or the processor's kind with its threads."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn what safetensors raises where there is no room into an OSError that names `folder`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None


def check_image_size(config_size: int, image_size: int) -> None:
    """Raise ParameterError where the checkpoint's images have another side than the packed ones."""
    if config_size != image_size:
        raise ParameterError(
            f"image_size: the checkpoint was made for {config_size} px, but this is {image_size}"
        )


@dataclass(frozen=True)
class Normalization:
    """What is subtracted from grey values / 255, and what they are divided by, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_normalization(source: Source) -> Normalization:
    """The checkpoint's own, from its preprocessor_config.json."""
    content, _ = source.load(ImageProcessingMixin.get_image_processor_dict)
    return Normalization(tuple(content["image_mean"]), tuple(content["image_std"]))


def to_pixels(
    grey: torch.Tensor,
    normal: Normalization,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Grey images, uint8 (B, side, side), normalized, float32 (B, 3, side, side), on their device.

    The grey channel stands for all three. `change` gets the grey images from 0 to 1, float32
    (B, 1, side, side), before that.
    """
    images = grey.float()[:, None] / 255
    if change is not None:
        images = change(images)
    mean, std = _on_device(normal, grey.device)
    return (images - mean) / std


@cache
def _on_device(normal: Normalization, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (1, 3, 1, 1), once for each device: a copy is a wait."""
    with torch.inference_mode(False):
        return tuple(
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (normal.mean, normal.std)
        )
