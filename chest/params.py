"""``params.yaml``: read once, checked, and passed on as typed values.

DVC writes ``-S …lr=1e-5`` as ``1e-05``, which YAML 1.1 (and so PyYAML) reads as a string, and it
reads ``010`` as ten, where YAML 1.1 reads eight: the loader below reads bare words and numbers as
YAML 1.2 does, as DVC itself does.
"""

import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from reprlib import Repr
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from chest.errors import ParameterError, printable
from chest.labels import LABELS

MAX_BYTES = 200_000  # of params.yaml; it has some 10,000

# The upper limits are generous: a value beyond them is a slip, and would fill memory or never end.
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=1000)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Images = Annotated[int, Field(ge=0, le=10**9)]


class Section(BaseModel):
    """A mapping whose keys are all known, all there, and of the right type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Slices(Section):
    position: Literal["center"] | Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    normalize: Literal["minmax", "window"]
    verify: bool


class Labels(Section):
    tuberculosis: Literal["ptb", "remarks"]


class Split(Section):
    train: Share
    val: Share
    test: Share
    group: Literal["patient", "image"]

    @model_validator(mode="after")
    def _shares_fill_the_whole(self):
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train, val and test add up to {total:g}, not to 1")
        return self


class SiglipPrompts(Section):
    covid19: Texts
    normal: Texts
    tuberculosis: Texts


class Modality(Section):
    ct: Text
    xray: Text


class Answers(Section):
    covid19: Text
    normal: Text
    tuberculosis: Text

    @model_validator(mode="after")
    def _answers_can_be_told_apart(self):
        # One answer inside another ("normal", "abnormal") could not be parsed.
        texts = [getattr(self, label).casefold() for label in LABELS]
        for text in texts:
            if sum(text in other for other in texts) > 1:
                raise ValueError(f"the answer {text!r} is part of another answer")
        return self


class QwenPrompts(Section):
    question: Text
    modality: Modality
    answers: Answers

    @model_validator(mode="after")
    def _question_tells_the_modality(self):
        if self.question.count("{modality}") != 1 or re.search(
            r"[{}]", self.question.replace("{modality}", "")
        ):
            raise ValueError("question: needs {modality} once, and no other braces")
        return self


class Prompts(Section):
    siglip: SiglipPrompts
    qwen: QwenPrompts


class ExpectedCounts(Section):
    covid19: Images
    normal: Images
    tuberculosis: Images


class Checkpoint(Section):
    checkpoint: Text  # a folder, or a name on the Hugging Face hub
    revision: Text
    batch_size: Annotated[int, Field(ge=1, le=65_536)]


class ZeroshotQwen(Checkpoint):
    method: Literal["likelihood", "generate"]
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)]
    images: Literal["test", "all"]


class ZeroshotSiglip(Checkpoint):
    images: Literal["test", "all"]


class Augment(Section):
    rotate: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False)]
    shift: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]
    scale: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]
    contrast: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class FinetuneSiglip(Checkpoint):
    lr: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)]
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    weight_decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    balance: Literal["none", "class", "class_modality", "logit_adjusted"]
    augment: Augment | None
    calibrate: Literal["none", "temperature"]
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"]
    save_every: Annotated[int, Field(ge=1, le=10**9)]


class Profile(Section):
    """What differs between the phantom and the study profile."""

    expected_counts: ExpectedCounts | None
    zeroshot_qwen: ZeroshotQwen
    zeroshot_siglip: ZeroshotSiglip
    finetune_siglip: FinetuneSiglip


class Params(Section):
    """All of ``params.yaml``."""

    profile: Literal["phantom", "study"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    image_size: Annotated[int, Field(ge=16, le=2048)]
    slices: Slices
    labels: Labels
    split: Split
    prompts: Prompts
    study: Profile
    phantom: Profile

    @property
    def chosen(self) -> Profile:
        """The block that `profile` names."""
        return self.study if self.profile == "study" else self.phantom

    @property
    def raw(self) -> Path:
        """The folder of the profile's three collections."""
        return Path("data/raw") / self.profile


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the bare words and numbers of YAML 1.2, without doubled keys."""

    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        times = Counter(key for key in keys if isinstance(key, Hashable))
        doubled = {str(key) for key, count in times.items() if count > 1}
        if doubled:
            raise yaml.constructor.ConstructorError(
                None, None, f"key given twice: {', '.join(sorted(doubled))}", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        text = self.construct_scalar(node)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

# YAML 1.2's core schema: a tag, what is of that kind where no tag is given, and how it may begin.
for _tag, _form, _begin in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),  # not of the schema; it has no constructor, and so is refused
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), _begin)


class _Short(Repr):
    """A value in a message, and no more of it: one that names others by aliases can be endless."""

    def repr_int(self, x, level):
        if x.bit_length() > 64:  # Python writes out no longer ones
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHORT = _Short()
_SHORT.maxlevel = 2


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `path`.

    Raises ParameterError, which names every key that is unknown, missing, of the wrong type, or of
    an impossible value; and where the file is no YAML, or of more than MAX_BYTES.
    """
    try:
        content = yaml.load(_read(Path(path)), _Loader)
    except Exception as error:  # PyYAML raises many kinds on text that only looks like YAML
        raise ParameterError(f"{path} cannot be read: {error}") from None
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise ParameterError(f"{path}:\n  " + "\n  ".join(lines)) from None


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return content.decode("utf-8")


def _describe(detail: dict) -> str:
    key = printable(".".join(str(part) for part in detail["loc"])) or "the file"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if detail["type"] == "missing":
        return f"{key}: missing"
    value = detail["input"]
    if isinstance(value, dict):
        return f"{key}: {detail['msg']}"
    return f"{key}: {detail['msg']} (found: {printable(_SHORT.repr(value))})"
