"""Fine-tuning of SigLIP by its own loss: images and texts of a class find each other.

Each pair of an image and a text in a batch is told apart by a sigmoid (Zhai et al. 2023,
arXiv:2303.15343). A text is a prompt of the image's class and modality, maybe with what a
vision-language model wrote of the image. It fits every image of its class and modality: in a batch
of three classes most pairs of one class would otherwise be called wrong. Images are classified by
the prompts alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from chest.core.files import write_json
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Params
from chest.data.annotations import read_annotations
from chest.data.dataset import Dataset
from chest.data.synthetic import TRAINED
from chest.models.common.checkpoints import Source
from chest.models.common.device import float_type, saving
from chest.models.common.pixels import (
    check_image_size,
    load_normalization,
    to_pixels,
    write_preprocessor,
)
from chest.models.settings import AnnotationPrompts
from chest.models.siglip import (
    PROMPTS,
    TEXT_LENGTH,
    PromptClassifier,
    SiglipPrompts,
    compare_rows,
    embed_classes,
    tokenize_prompts,
)
from chest.training.augmentation import change
from chest.training.classification import ClassifierSettings, Selection
from chest.training.finetuning import set_up, train_and_answer
from chest.training.loop import Batch

BLOCK = "finetune_siglip_text"


class ImageTextSettings(ClassifierSettings):
    """The block ``finetune_siglip_text`` of a profile in params.yaml, which documents it."""


class Matcher(nn.Module):
    """SigLIP as the training loop calls it: the logits of all pairs of images and texts."""

    def __init__(self, siglip: SiglipModel):
        super().__init__()
        self.siglip = siglip

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, T), of pixels (B, 3, side, side) and tokens, int64 (T, 64)."""
        return self.siglip(input_ids=tokens, pixel_values=pixels).logits_per_image


@dataclass(frozen=True)
class Texts:
    """Token ids of the training texts: ``tokens``, int64 (T, 64).

    The texts of image i are the rows of `of_image`, int64 (N, prompts of a class).
    """

    tokens: torch.Tensor
    of_image: torch.Tensor


@dataclass
class ImageText(Selection):
    """The mean sigmoid loss of all pairs of a batch; classification by prompts."""

    siglip: SiglipModel
    tokenizer: PreTrainedTokenizerBase
    prompts: SiglipPrompts
    tokens: list[list[torch.Tensor]]  # of the prompts, by MODALITIES and LABELS
    texts: Texts
    annotated_by: str | None = None  # the checkpoint that described the images

    @property
    def network(self) -> PreTrainedModel:
        return self.siglip

    def predict(self, rows: np.ndarray) -> np.ndarray:
        classes = embed_classes(self.siglip, self.tokens)
        classifier = PromptClassifier(self.siglip, classes, self.normalization)
        told = self.data.table["modality"].to_numpy()[rows]
        size = 2 * self.settings.batch_size
        found = compare_rows(self.accelerator, classifier, self.images, rows, told, size)
        return np.log(np.maximum(found, np.finfo(np.float64).tiny))

    @torch.no_grad()
    def divide(self, temperature: float) -> None:
        self.siglip.logit_scale -= math.log(temperature)  # of the similarities

    def save(self, folder: Path) -> None:
        with saving(folder):
            self.siglip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PROMPTS, self.prompts.model_dump())
        write_preprocessor(folder, self.normalization, self.settings.image_size)

    def details(self, model: nn.Module, rows: np.ndarray) -> dict:
        """Return which checkpoint described the images, if one did."""
        return {"annotated_by": self.annotated_by} if self.annotated_by else {}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of all pairs of `batch`.

        Each image brings one of its texts, another one in each of its turns.
        """
        dtype = float_type(self.accelerator)
        augment = None if batch.changes is None else partial(change, changes=batch.changes)
        pixels = to_pixels(batch.images, self.normalization, augment, dtype)
        turn = torch.arange(len(batch.rows), device=batch.rows.device)
        choices = self.texts.of_image[batch.rows]
        tokens = self.texts.tokens[choices[turn, (turn + batch.rows) % choices.shape[1]]]
        with self.accelerator.autocast():
            logits = model(pixels, tokens).to(dtype)
        group = self.groups[batch.rows]
        fits = group[:, None] == group[None]
        return -logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()

    @cached_property
    def groups(self) -> torch.Tensor:
        """A number for the class and modality of each image, int64 (N,)."""
        return self.targets * len(MODALITIES) + self.modalities


def load_siglip(source: Source, image_size: int, dtype: torch.dtype) -> SiglipModel:
    """Load both towers for images of `image_size` px."""
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    return source.load_model(SiglipModel, config=config, dtype=dtype)


def make_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: SiglipPrompts,
    data: Dataset,
    notes: Sequence[str] | None,
    device: torch.device,
) -> Texts:
    """Return the texts of the training images: each prompt of the class and modality.

    With `notes`, one for each image of `data`, the image's own stands behind the prompt. Texts are
    cut after 64 tokens. Classes with fewer prompts than others repeat them.
    """
    most = max(len(getattr(prompts, label)) for label in LABELS)
    texts: dict[str, int] = {}
    of_image = np.zeros((len(data.table), most), np.int64)
    for row in data.rows(*TRAINED):
        image = data.table.iloc[row]
        own = prompts.of(image["label"], image["modality"])
        note = f". {notes[row]}" if notes and notes[row] else ""
        for i in range(most):
            text = (own[i % len(own)] + note).lower()
            of_image[row, i] = texts.setdefault(text, len(texts))
    padding = {"padding": "max_length", "padding_side": "right", "max_length": TEXT_LENGTH}
    tokens = tokenizer([*texts], truncation=True, return_tensors="pt", **padding)["input_ids"]
    return Texts(tokens.to(device), torch.from_numpy(of_image).to(device))


def finetune_image_text(system: str, name: str, params: Params, notes: bool) -> None:
    """Train both towers; see `set_up` and `train_and_answer`.

    With `notes` the texts hold the descriptions of data/annotations.csv.
    """
    setup = set_up(system, BLOCK, params, ImageTextSettings)
    settings, accelerator, source = setup.settings, setup.accelerator, setup.source
    prompts = params.section("prompts.siglip", SiglipPrompts)
    tokenizer = source.load_tokenizer()
    siglip = load_siglip(source, settings.image_size, float_type(accelerator))
    siglip.to(accelerator.device)
    descriptions, made = None, {}
    if notes:
        findings = params.section("prompts.annotations", AnnotationPrompts).findings
        real = setup.data.table.iloc[: len(setup.data.table) - setup.synthetic]
        _, descriptions, made = read_annotations(real, [*findings])
        descriptions += [""] * setup.synthetic
    objective = ImageText(
        *(settings, setup.data, accelerator, setup.images, load_normalization(source)),
        siglip=siglip,
        tokenizer=tokenizer,
        prompts=prompts,
        tokens=tokenize_prompts(source, tokenizer, prompts),
        texts=make_texts(tokenizer, prompts, setup.data, descriptions, accelerator.device),
        annotated_by=made.get("checkpoint"),
    )
    more = {"prompts": prompts.model_dump(), "notes": descriptions}
    train_and_answer(setup, name, Matcher(siglip), objective, more)
