"""Settings that several systems share; importing them needs no PyTorch."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from chest.core.labels import SPLITS
from chest.core.params import Positive, Section, Text, Texts


class Modalities(Section):
    """How questions and prompts describe an image of each modality."""

    ct: Text
    xray: Text


class ZeroshotSettings(Section):
    """A zero-shot system's block of a profile in params.yaml."""

    checkpoint: Text  # a folder, or a repository of the Hugging Face hub
    revision: Text
    image_size: Positive
    images: Literal["test", "all"]
    batch_size: Positive

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to classify: thresholds and calibration need the validation split too."""
        return SPLITS if self.images == "all" else ("val", "test", "external")


class AnnotationPrompts(Section):
    """``prompts.annotations`` in params.yaml: a question with answers, and one for text."""

    finding: Text
    description: Text
    modality: Modalities
    findings: Annotated[dict[str, Texts], Field(min_length=2, max_length=100)]

    @model_validator(mode="after")
    def _names_modality(self):
        for text in (self.finding, self.description):
            if re.findall(r"{.*?}|[{}]", text) != ["{modality}"]:
                raise ValueError(f"{text!r}: needs {{modality}} once, and no other braces")
        return self

    def ask(self, text: str, modality: str) -> str:
        """Return the question `text` about an image of `modality`."""
        return text.format(modality=getattr(self.modality, modality))
