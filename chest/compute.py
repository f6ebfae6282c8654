"""Where and how models run: one device, one precision, one way to share work between processes."""

import json
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

from chest.errors import ChestError, ParameterError, printable

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "scikit-learn")


class CheckpointError(ChestError):
    """A checkpoint that is missing, incomplete, or of another kind."""


def describe(error: Exception) -> str:
    """A foreign error in one line, with its kind: some say nothing else."""
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"


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

    def load(self, load: Callable, part: str = "config.json", **arguments):
        """`load` (a from_pretrained) with this checkpoint; raises CheckpointError.

        `part` says in messages what is loaded.
        """
        with self.reading(part):
            return load(self.checkpoint, revision=self.commit or self.revision, **arguments)

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turn whatever is raised on this checkpoint's `part` into a CheckpointError.

        But not where memory, of the device too, is what lacks.
        """
        try:
            yield
        except (ChestError, MemoryError, torch.OutOfMemoryError):
            raise
        except OSError as error:
            raise CheckpointError(f"checkpoint {self}: {error}") from None
        except Exception as error:  # bad files raise nearly every kind
            raise self.unfit(f"its {part} cannot be used ({describe(error)})") from None

    def unfit(self, found: str) -> CheckpointError:
        """The error that says what was found in a checkpoint that will not do."""
        return CheckpointError(f"checkpoint {self}: {found}; fetch it again, or name another one")

    def load_config(self, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
        """The configuration, as a `kind`; raises CheckpointError where it is another model's.

        Only config.json is fetched. transformers itself would take the sizes of a `kind` that the
        file does not name from its defaults.
        """
        content, _ = self.load(PreTrainedConfig.get_config_dict)
        with self.reading("config.json"):
            found = content.get("model_type")
        if found is None:
            raise self.unfit("it has no config.json that names the kind of model")
        if found != kind.model_type:
            raise CheckpointError(
                f"checkpoint {self}: it is a model of the kind {printable(found)}, but this stage"
                f" reads {kind.model_type}"
            )
        config = self.load(kind.from_pretrained)
        for settings in (config, *(getattr(config, name) for name in config.sub_configs)):
            settings.return_dict = True  # whatever the file says: outputs are read by name
        return config

    def load_model(
        self, load: Callable, fresh: Sequence[str] = (), spare: Sequence[str] = (), **arguments
    ):
        """As `load`, with the weights from safetensors: all that the model has, and no others.

        It need not have those of the names `fresh`, and may have others that begin as `spare`.
        """
        if self.commit is None:
            self._check_shards()
        arguments |= {"part": "weights or config.json", "use_safetensors": True}
        # First without memory: the sizes in config.json may be any. transformers' own error names
        # no weight of another shape.
        hollow = {"device_map": "meta", "ignore_mismatched_sizes": True}
        model, info = self.load(load, output_loading_info=True, **arguments, **hollow)
        kind = type(model).__name__
        lacking = sorted(set(info["missing_keys"]) - set(fresh)) + sorted(
            key for key, *_ in info["mismatched_keys"]
        )
        if lacking:
            raise self.unfit(
                f"{len(lacking)} weights of {kind} are not in it or have another shape"
                f" ({', '.join(lacking[:3])})"
            )
        foreign = sorted(k for k in info["unexpected_keys"] if not k.startswith(tuple(spare)))
        if foreign:  # with fewer layers than it was trained with, a model answers otherwise
            raise self.unfit(
                f"{len(foreign)} of its weights have no place in the {kind} of its config.json"
                f" ({printable(', '.join(foreign[:3]))})"
            )
        return self.load(load, **arguments)

    def _check_shards(self) -> None:
        """Raise CheckpointError where a folder's index leads to weights outside the folder."""
        for path in Path(self.checkpoint).rglob("*.index.json"):
            with self.reading(path.name):
                names = set(json.loads(path.read_bytes())["weight_map"].values())
                outside = sorted(name for name in names if Path(name).name != name)
            if outside:
                raise self.unfit(f"{path.name} leads out of the folder ({printable(outside[0])})")

    def __str__(self) -> str:
        return f"{self.checkpoint} (revision {self.revision})"


def find_checkpoint(checkpoint: str, revision: str) -> Source:
    """A folder, or a repository of the Hugging Face hub at the commit that `revision` names now.

    The commit is resolved once, so that weights, tokenizer and preprocessor belong together.
    Raises CheckpointError where there is no such folder, or the hub has no such checkpoint, and
    OSError where a file of the folder cannot be read.
    """
    if Path(checkpoint).is_dir():
        for path in Path(checkpoint).iterdir():
            if path.is_file():  # transformers takes some that it may not read for missing ones
                path.open("rb").close()
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
    """The checkpoint's own, from its preprocessor_config.json; raises CheckpointError."""
    part = "preprocessor_config.json"
    content, _ = source.load(ImageProcessingMixin.get_image_processor_dict, part)
    with source.reading(part):
        given = content["image_mean"], content["image_std"]
        values = torch.tensor(given, dtype=torch.float32)
    if values.shape != (2, 3) or not values.isfinite().all() or values[1].min() <= 0:
        raise source.unfit(
            f"its {part} has image_mean {given[0]} and image_std {given[1]}, not three finite"
            " numbers each, the latter above 0"
        )
    return Normalization(*(tuple(map(float, numbers)) for numbers in given))


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
