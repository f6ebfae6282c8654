"""What the training of a classifier of LABELS minimises, and how its epochs are compared."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from scipy.special import softmax
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Count, Section, Text
from chest.data.dataset import Dataset
from chest.data.synthetic import TRAINED
from chest.evaluation.predictions import Record, tabulate, write
from chest.models.common.classification import (
    Head,
    ImageRows,
    class_logits,
    classify_rows,
    head_of,
    save_classifier,
)
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import Normalization, to_pixels
from chest.models.common.views import View
from chest.models.encoders import Encoder, Pooling, extract
from chest.training.adversary import Domains, probe_sites, reversal, score_discriminator
from chest.training.augmentation import change
from chest.training.calibration import divide_logits, negative_log_likelihood
from chest.training.loop import Batch
from chest.training.sampling import logit_adjustment
from chest.training.selection import best_epoch, validation_figures
from chest.training.settings import LoopSettings


class SyntheticImages(Section):
    """How many synthetic images of each class that there are join the training images."""

    per_class: Count = 0


class ClassifierSettings(LoopSettings):
    """What every training of a classifier of LABELS shares."""

    checkpoint: Text
    revision: Text
    balance: Literal["none", "class", "class_modality", "logit_adjusted"]
    select_by: Literal["within", "uar", "worst"]
    calibrate: Literal["none", "temperature"]
    view: View
    synthetic: SyntheticImages = SyntheticImages()


class TrainingSettings(ClassifierSettings):
    """Fine-tuning settings of an encoder; ``params.yaml`` documents each."""

    weights: Literal["pretrained", "random"]
    batch_norm: Literal["pretrained", "estimated"] = "pretrained"
    pooling: Pooling = "mean"
    head: Head
    adversary: Literal["none", "site", "modality"]
    adversary_lr: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    adversary_weight: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    adversary_ramp: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


@dataclass
class Selection(ABC):
    """Validation and selection, the same for every classifier of LABELS.

    Subclasses add what is particular to a kind of model: its loss, answers and files.
    """

    settings: ClassifierSettings
    data: Dataset
    accelerator: Accelerator
    images: ImageStore
    normalization: Normalization

    @property
    @abstractmethod
    def network(self) -> PreTrainedModel:
        """The network that the record of the run describes."""

    @abstractmethod
    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Return the logits of LABELS for `rows`, float64 (n, 3), in evaluation mode."""

    @abstractmethod
    def divide(self, temperature: float) -> None:
        """Divide the logits by a temperature, so that the model is saved calibrated."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model to `folder`, which does not exist yet."""

    def details(self, model: nn.Module, rows: np.ndarray) -> dict:
        """Return what the record is to tell of the trained `model` and its answers to `rows`."""
        return {}

    def answer(self, system: str, rows: np.ndarray, seen: np.ndarray) -> Callable[[Record], None]:
        """Answer `rows`; return a function that writes the answers with their record.

        Images that were not `seen`, bool (n,), get no answer. Called in every process.
        """
        shares = softmax(self.predict(rows), axis=1)
        answers = [x if given else None for x, given in zip(shares, seen, strict=True)]
        return partial(write, system, tabulate(self.data.table.iloc[rows], answers))

    def validate(self) -> dict[str, float]:
        """Return val_loss and the `validation_figures`."""
        rows = self.data.rows("val")
        logits = self.predict(rows)
        loss = negative_log_likelihood(logits, self.data.targets()[rows])
        predicted = np.array(LABELS)[logits.argmax(axis=1)]
        return {"val_loss": loss} | validation_figures(self.data.table.iloc[rows], predicted)

    def best_epoch(self, curve: list[dict]) -> int:
        """Return the epoch with the best figure ``select_by``."""
        return best_epoch(curve, self.settings.select_by)

    @cached_property
    def targets(self) -> torch.Tensor:
        """The class of each image as its position in LABELS, int64 (N,), on the device."""
        return self.on_device(self.data.targets())

    @cached_property
    def modalities(self) -> torch.Tensor:
        """The modality of each image as its position in MODALITIES, int64 (N,), on the device."""
        return self.on_device(self.data.modalities())

    def on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, device=self.accelerator.device)


@dataclass
class Classification(Selection):
    """Cross-entropy of an image classifier, with the adversary's loss if there are ``domains``."""

    settings: TrainingSettings
    classifier: PreTrainedModel
    domains: Domains | None = None

    @property
    def network(self) -> PreTrainedModel:
        return self.classifier

    def predict(self, rows: np.ndarray) -> np.ndarray:
        data = ImageRows(self.images, rows, self.normalization, self.data.modalities())
        return classify_rows(self.accelerator, self.classifier, data, self.batch_size)

    def divide(self, temperature: float) -> None:
        divide_logits(head_of(self.classifier), temperature)

    def save(self, folder: Path) -> None:
        save_classifier(self.classifier, self.normalization, self.settings.image_size, folder)

    def details(self, model: nn.Module, rows: np.ndarray) -> dict:
        """Return how well the site is found in the features, and by the discriminator."""
        features, table = self.features(rows), self.data.table.iloc[rows]
        found = probe_sites(features, table)
        if self.domains:
            found |= score_discriminator(model, features, self.domains.of(rows), table)
        return found

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return the pooled features of `rows`, float64 (n, d)."""
        encoder = Encoder(self.classifier, self.normalization)
        return extract(self.accelerator, encoder, self.images, rows, self.batch_size)

    @property
    def batch_size(self) -> int:
        """Images at a time in evaluation: twice a training batch, since no gradients are kept."""
        return 2 * self.settings.batch_size

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of `batch`."""
        dtype = float_type(self.accelerator)
        augment = None if batch.changes is None else partial(change, changes=batch.changes)
        pixels = to_pixels(batch.images, self.normalization, augment, dtype)
        if self.domains is None:
            with self.accelerator.autocast():
                outputs = model(pixel_values=pixels).logits
            return self.class_loss(outputs.to(dtype), batch.rows)
        settings = self.settings
        strength = reversal(batch.progress, settings.adversary_weight, settings.adversary_ramp)
        with self.accelerator.autocast():
            outputs, domains = model(pixels, torch.full((), strength, device=pixels.device))
        loss = self.class_loss(outputs.to(dtype), batch.rows)
        return loss + self.domain_loss(domains.to(dtype), batch.rows)

    def class_loss(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the classes. The masked head is masked at inference only."""
        by_modality = self.settings.head == "by_modality"
        modalities = self.modalities[rows]
        logits = class_logits(outputs, "by_modality" if by_modality else "shared", modalities)
        return cross_entropy(logits + self.adjustment[modalities], self.targets[rows])

    def domain_loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the domains that are possible in each image's modality."""
        possible = self.possible_domains[self.modalities[rows]]
        return cross_entropy(logits.masked_fill(~possible, -torch.inf), self.domain_codes[rows])

    @cached_property
    def domain_codes(self) -> torch.Tensor:
        return self.on_device(self.domains.codes)

    @cached_property
    def possible_domains(self) -> torch.Tensor:
        return self.on_device(self.domains.possible)

    @cached_property
    def adjustment(self) -> torch.Tensor:
        """The `logit_adjustment` in each of MODALITIES, (2, 3); the same unless heads differ."""
        rows, settings = self.data.rows(*TRAINED), self.settings
        targets, modalities = self.data.targets()[rows], self.data.modalities()[rows]
        parts = [
            targets[modalities == m] if settings.head == "by_modality" else targets
            for m in range(len(MODALITIES))
        ]
        found = torch.stack([logit_adjustment(part, settings.balance) for part in parts])
        return found.to(self.accelerator.device, float_type(self.accelerator))
