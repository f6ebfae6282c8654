"""``params.yaml``: read once, checked, and passed on as typed values.

Each stage declares its own settings as a `Section` next to its code and reads them with
`Params.section` (a top-level block) or `Params.system` (a block of the chosen profile).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from chest.core.errors import ParameterError, printable

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=1000)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]


class Section(BaseModel):
    """A mapping with known keys only. Numbers may be strings: YAML 1.1 reads 1e-05 as one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Value = TypeVar("Value")


@dataclass(frozen=True)
class Params:
    """The content of ``params.yaml``; ``profile`` and ``seed`` concern every stage."""

    content: dict
    profile: Literal["phantom", "study"]
    seed: int

    @property
    def raw(self) -> Path:
        """The folder of the profile's collections."""
        return Path("data/raw") / self.profile

    def section(self, key: str, kind: type[Value]) -> Value:
        """Return the block `key` (dotted), checked as `kind`: a Section or any annotation."""
        return _read(self.content, tuple(key.split(".")), kind)

    def system(self, key: str, kind: type[Value]) -> Value:
        """Return the block `key` (dotted) of the chosen profile, checked as `kind`."""
        return _read(self.content, (self.profile, *key.split(".")), kind)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read `path`; raises ParameterError if it is no YAML mapping or lacks profile or seed."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"there is no {path} here: run this in the repository's root"
        raise ParameterError(message) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: a mapping expected, {type(content).__name__} found")
    profile = _read(content, ("profile",), Literal["phantom", "study"])
    seed = _read(content, ("seed",), Annotated[int, Field(ge=0, lt=2**32)])
    return Params(content, profile, seed)


def _read(content: dict, keys: tuple[str, ...], kind: type[Value]) -> Value:
    """Check the value at `keys`; the message of a ParameterError names every key at fault."""
    name = ".".join(keys)
    value = content
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ParameterError(f"params.yaml: {name}: missing")
        value = value[key]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        lines = [_describe(name, detail) for detail in error.errors()]
        raise ParameterError("params.yaml:\n  " + "\n  ".join(lines)) from None


def _describe(name: str, detail: dict) -> str:
    key = printable(".".join([name, *map(str, detail["loc"])]))
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if detail["type"] == "missing":
        return f"{key}: missing"
    found = detail["input"]
    shown = "" if isinstance(found, dict) else f" (found: {printable(repr(found))[:100]})"
    return f"{key}: {detail['msg']}{shown}"
