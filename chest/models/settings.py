"""Settings that zero-shot systems share."""

from typing import Literal

from chest.core.labels import SPLITS
from chest.core.params import Positive, Section, Text


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
