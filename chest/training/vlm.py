"""Fine-tuning of a vision-language model: it learns to give the answers that it is scored by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Params, Positive
from chest.data.synthetic import TRAINED
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import Record
from chest.models.common.checkpoints import Source
from chest.models.vlm.adapter import (
    Answering,
    LoraSettings,
    add_adapters,
    describe_trainable,
    make_head,
    save_adapter,
)
from chest.models.vlm.asking import (
    AskedRows,
    Asker,
    AskingSettings,
    VlmPrompts,
    asked,
)
from chest.models.vlm.controls import Replies, ask_with_controls
from chest.models.vlm.likelihood import encode
from chest.models.vlm.model import load_vlm
from chest.models.vlm.zeroshot import describe_asking
from chest.training.augmentation import change
from chest.training.classification import ClassifierSettings, Selection
from chest.training.finetuning import set_up, train_and_answer
from chest.training.loop import Batch
from chest.training.sampling import logit_adjustment


class VlmTrainingSettings(ClassifierSettings):
    """A block of params.yaml, which documents each setting."""

    method: Literal["words", "head"]
    loss: Literal["classes", "answer"]
    lora: LoraSettings
    checkpointing: bool
    inference_batch: Positive


class Reader(nn.Module):
    """A model as the training loop calls it: images in, log-likelihoods of the classes out.

    Images of each modality are asked with their own question; the tokens before the image are read
    again each time, since the weights that read them change.
    """

    def __init__(self, asker: Asker):
        super().__init__()
        self.asker = asker
        self.network, self.head = asker.vlm.model, asker.head
        prompts = asker.prompts
        texts = [prompts.ask(modality, prompts.question) for modality in MODALITIES]
        self.questions = [asker.prepare(text, share=False) for text in texts]

    def forward(
        self, images: torch.Tensor, modalities: torch.Tensor, changes: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the log-likelihoods, (B, 3), of uint8 grey `images`, (B, side, side).

        `modalities` are positions in MODALITIES, (B,); `changes` the augmentation of each image.
        """
        dtype = torch.promote_types(self.network.dtype, torch.float32)
        result = torch.zeros(len(images), len(LABELS), device=images.device, dtype=dtype)
        for number, question in enumerate(self.questions):
            own = torch.nonzero(modalities == number)[:, 0]
            if len(own):
                augment = None if changes is None else partial(change, changes=changes[own])
                seen = encode(self.asker.vlm, images[own], augment)
                result = result.index_add(0, own, self.asker.score(seen, question).to(dtype))
        return result


@dataclass
class AnswerObjective(Selection):
    """The likelihood of the right answer, among those of the classes or among all texts."""

    settings: VlmTrainingSettings
    reader: Reader
    adapted: PeftModel
    temperature: float = 1.0  # by which likelihoods are divided; stored beside the weights

    @property
    def network(self) -> PreTrainedModel:
        return self.reader.network

    def predict(self, rows: np.ndarray) -> np.ndarray:
        about = AskedRows(self.images, rows, self.data.table["modality"].to_numpy()[rows])
        return self.reader.asker.ask(about, [asked(self.reader.asker.prompts)])[:, 0]

    def divide(self, temperature: float) -> None:
        self.temperature = temperature

    def save(self, folder: Path) -> None:
        source, settings = self.reader.asker.vlm.source, self.settings
        answering = Answering(
            checkpoint=settings.checkpoint,
            revision=source.commit or settings.revision,
            image_size=settings.image_size,
            method=settings.method,
            temperature=self.temperature,
            prompts=self.reader.asker.prompts,
        )
        folder.mkdir()
        save_adapter(folder, self.adapted, self.reader.head, answering)

    def details(self, model: nn.Module, rows: np.ndarray) -> dict:
        """Return what trained and how the model was asked."""
        return {
            "trainable": describe_trainable(self.reader),
            **describe_asking(self.reader.asker),
            "method": self.settings.method,
            "prior": self.reader.asker.settings.correction,
        }

    def answer(self, system: str, rows: np.ndarray, seen: np.ndarray) -> Callable[[Record], None]:
        """Answer `rows` with all controls; see `Selection.answer`."""
        replies = ask_with_controls(self.reader.asker, self.images, self.data, rows)
        tables = tabulate(replies, self.temperature, seen)
        return partial(write_answers, system, self.data.table.iloc[rows], tables)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of `batch`."""
        likelihoods = model(batch.images, self.modalities[batch.rows], batch.changes)
        if self.settings.loss == "classes":
            likelihoods = (likelihoods + self.adjustment).log_softmax(1)
        return nll_loss(likelihoods, self.targets[batch.rows])

    @cached_property
    def adjustment(self) -> torch.Tensor:
        targets = self.data.targets()[self.data.rows(*TRAINED)]
        return logit_adjustment(targets, self.settings.balance).to(self.accelerator.device)


def finetune_vlm(system: str, block: str, name: str, params: Params) -> None:
    """Train the adapters of a vision-language model; see `set_up` and `train_and_answer`."""
    setup = set_up(system, block, params, VlmTrainingSettings)
    settings, accelerator = setup.settings, setup.accelerator
    prompts = params.section("prompts.vlm", VlmPrompts)
    reader, adapted = load_reader(accelerator, setup.source, prompts, settings, params.seed)
    shared = (settings, setup.data, accelerator, setup.images, reader.asker.vlm.normalization)
    objective = AnswerObjective(*shared, reader, adapted)
    train_and_answer(setup, name, reader, objective, {"prompts": prompts.model_dump()})


def load_reader(
    accelerator: Accelerator,
    source: Source,
    prompts: VlmPrompts,
    settings: VlmTrainingSettings,
    seed: int,
) -> tuple[Reader, PeftModel]:
    """Load the checkpoint with new adapters, and a new head if there is one."""
    vlm = load_vlm(accelerator, source, settings.image_size)
    adapted = add_adapters(vlm, settings.lora, seed)
    head = make_head(vlm, seed) if settings.method == "head" else None
    if settings.checkpointing:
        vlm.model.activation_checkpointing_enable({"use_reentrant": False})
    asking = AskingSettings(method="likelihood", max_new_tokens=1, prior="none")
    asker = Asker(accelerator, vlm, prompts, asking, settings.inference_batch, head)
    return Reader(asker).to(accelerator.device), adapted


def tabulate(replies: Replies, temperature: float, accepted: np.ndarray) -> dict:
    """Tabulate `replies` at a temperature; images that are not `accepted`, bool (n,), have none."""
    scaled = {name: own / temperature for name, own in replies.decisive.items()}
    tables = replace(replies, decisive=scaled).tabulate()
    return {
        name: ([x if seen else None for x, seen in zip(answers, accepted, strict=True)], covered)
        for name, (answers, covered) in tables.items()
    }
