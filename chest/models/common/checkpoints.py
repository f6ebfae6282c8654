"""Checkpoints: a folder or a repository of the Hugging Face hub, with weights in safetensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from chest.core.errors import ChestError, printable
from chest.models.common import memory

# What a damaged or foreign file of a checkpoint raises; JSON and Unicode errors are ValueErrors.
# Any other exception is a bug or an incompatible library, and keeps its traceback.
BAD_FILE = (OSError, SafetensorError, StrictDataclassError, TemplateError, ValueError, KeyError)


class CheckpointError(ChestError):
    """A checkpoint that is missing, incomplete, or of another kind."""


@dataclass(frozen=True)
class Source:
    """Where weights come from. ``commit``: what `revision` resolved to, None for a folder."""

    checkpoint: str
    revision: str
    commit: str | None

    def load(self, load: Callable, part: str = "config.json", **arguments):
        """Call `load` (a ``from_pretrained``) with this checkpoint; `part` is named in errors.

        Raises CheckpointError if a file is missing or cannot be parsed.
        """
        with self.reading(part):
            return load(self.checkpoint, revision=self.commit or self.revision, **arguments)

    def load_dict(self, load: Callable, part: str = "config.json") -> dict:
        """Return the content of a JSON file, read by a ``get_..._dict`` of transformers.

        Raises CheckpointError if the file is missing or holds no mapping.
        """
        content, _ = self.load(load, part)
        if not isinstance(content, dict):
            raise self.error(f"its {part} holds no mapping")
        return content

    @contextmanager
    def reading(self, part: str, *other: type[Exception]) -> Iterator[None]:
        """Turn BAD_FILE and `other` errors of a block that parses `part` into CheckpointError."""
        try:
            yield
        except (*BAD_FILE, *other) as error:
            if memory.explain(error):
                raise  # no fault of the file
            reason = f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
            raise self.error(f"cannot read its {part} ({reason})") from None

    def error(self, found: str) -> CheckpointError:
        """Return the error that says what is wrong with this checkpoint."""
        return CheckpointError(f"checkpoint {self}: {found}; fetch it again or name another one")

    def load_config(self, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
        """Load the configuration; raises CheckpointError if it is not a `kind`.

        Only config.json is fetched. Without this check transformers would read another model's
        file and fill in the sizes that it does not name with the defaults of `kind`.
        """
        found = self.load_dict(PreTrainedConfig.get_config_dict).get("model_type")
        if found != kind.model_type:
            raise self.error(f"its model_type is {printable(found)}, expected {kind.model_type}")
        return self.load(kind.from_pretrained)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the checkpoint."""
        # sentencepiece raises RuntimeError for a damaged file, transformers the others for a list.
        with self.reading("tokenizer", RuntimeError, TypeError, AttributeError):
            return self.load(AutoTokenizer.from_pretrained, "tokenizer")

    def load_model(
        self,
        kind: type[PreTrainedModel],
        new: Sequence[str] = (),
        unused: Sequence[str] = (),
        **arguments,
    ) -> PreTrainedModel:
        """Load a model of class `kind` and check that every weight comes from the checkpoint.

        `new` names weights that may be missing or of another shape (a new head); `unused` are
        prefixes of weights that the model does not have. Other `arguments` go to
        ``from_pretrained``. Raises CheckpointError for all other weights that are missing, have
        another shape or have no place in the model: transformers would initialise them at random,
        or drop them, and only warn.
        """
        model, info = self.load(
            kind.from_pretrained,
            "weights",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        missing = {*info["missing_keys"], *mismatched} - {*new}
        if missing:
            raise self.error(f"weights are missing or of another shape: {_shorten(missing)}")
        foreign = {key for key in info["unexpected_keys"] if not key.startswith(tuple(unused))}
        if foreign:
            name = type(model).__name__
            raise self.error(f"{name} has no place for weights: {_shorten(foreign)}")
        return model

    def __str__(self) -> str:
        return f"{self.checkpoint} (revision {self.revision})"


def find_checkpoint(checkpoint: str, revision: str) -> Source:
    """Find a folder, or a repository of the Hugging Face hub at the commit of `revision`.

    The commit is resolved once, so that weights, tokenizer and preprocessor belong together.
    Raises CheckpointError if there is no such folder or repository.
    """
    source = Source(checkpoint, revision, None)
    if Path(checkpoint).is_dir():
        return source
    if checkpoint.count("/") != 1 or checkpoint[0] in "./":
        raise CheckpointError(f"checkpoint {source}: no such folder, and no name on the hub")
    config = source.load(lambda name, **where: cached_file(name, "config.json", **where))
    return Source(checkpoint, revision, Path(config).parent.name)


def _shorten(names: set[str]) -> str:
    shown = printable(", ".join(sorted(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
