"""Questions to a vision-language model, and its answers to many images.

The question is the same for all images of a modality, and a batch holds one modality only, so that
no row is padded. Questions about the same image share the work of the vision tower.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf, nan
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import nn
from transformers.utils import ModelOutput

from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Positive, Section, Text, Texts
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.image_store import ImageStore
from chest.models.common.journal import Journal
from chest.models.settings import Modalities, ZeroshotSettings
from chest.models.vlm.generation import generate_answers, parse_answer
from chest.models.vlm.likelihood import (
    Question,
    class_likelihoods,
    encode,
    linear,
    prepare_question,
    read,
)
from chest.models.vlm.model import Vlm

PRIORS = ("none", "content_free", "unlabelled")


class AskingSettings(Section):
    """How a vision-language model is asked: for ``params.yaml``, which documents each setting."""

    method: Literal["likelihood", "generate"]
    max_new_tokens: Positive
    prior: Literal["none", "content_free", "unlabelled"]

    @property
    def correction(self) -> str:
        """The prior that is subtracted: free text has no likelihood to correct."""
        return "none" if self.method == "generate" else self.prior


class VlmSettings(ZeroshotSettings, AskingSettings):
    """The block of a zero-shot vision-language model in a profile of params.yaml."""


class NamedVlmSettings(VlmSettings):
    """A block of ``zeroshot_vlm``; ``name`` is what tables and charts show."""

    name: Annotated[Text, Field(max_length=40)]


class Answers(Section):
    """Spellings of the model's answer for each class; the question offers the first one."""

    covid19: Texts
    normal: Texts
    tuberculosis: Texts

    @model_validator(mode="after")
    def _distinct(self):
        for a, b in permutations(LABELS, 2):
            theirs = [text.casefold() for text in getattr(self, b)]
            if any(text.casefold() in other for text in getattr(self, a) for other in theirs):
                raise ValueError(
                    f"an answer of {a} is part of one of {b}, so free text would name both"
                )
        for label in LABELS:
            if len({*getattr(self, label)}) < len(getattr(self, label)):
                raise ValueError(f"{label}: a spelling twice, whose probability would count twice")
        return self


class VlmPrompts(Section):
    """``prompts.vlm`` in params.yaml."""

    question: Text
    paraphrases: Annotated[list[Text], Field(min_length=3, max_length=3)]
    modality: Modalities
    answers: Answers

    @model_validator(mode="after")
    def _has_places(self):
        for text in (self.question, *self.paraphrases):
            if sorted(re.findall(r"{.*?}|[{}]", text)) != ["{classes}", "{modality}"]:
                raise ValueError(
                    f"{text!r}: needs {{modality}} and {{classes}} once, and no other braces"
                )
        return self

    def spellings(self, order: Sequence[str] = LABELS) -> list[list[str]]:
        """Return the answers of each class."""
        return [getattr(self.answers, label) for label in order]

    def ask(self, modality: str, text: str, order: Sequence[str] = LABELS) -> str:
        """Return the question `text` about an image of `modality`, with the classes in `order`."""
        *first, last = (spellings[0] for spellings in self.spellings(order))
        classes = f"{', '.join(first)} or {last}"
        return text.format(modality=getattr(self.modality, modality), classes=classes)


# --- Conditions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """A way of asking: a question, the order of the classes in it, and which image is shown."""

    name: str
    question: str
    order: tuple[str, ...] = LABELS
    image: Literal["own", "other", "none"] = "own"


def asked(prompts: VlmPrompts) -> Condition:
    """Return the question itself."""
    return Condition("asked", prompts.question)


def controls(prompts: VlmPrompts) -> list[Condition]:
    """Return the question, and ways of asking that should not matter, or should matter a lot.

    Without the image and with another patient's of the same modality nothing can be known but the
    modality; the order of the classes and other words should change nothing.
    """
    orders = [order for order in permutations(LABELS) if order != LABELS]
    return [
        asked(prompts),
        Condition("no_image", prompts.question, image="none"),
        Condition("other_image", prompts.question, image="other"),
        *(Condition("order_" + "_".join(own), prompts.question, own) for own in orders),
        *(Condition(f"paraphrase_{i}", x) for i, x in enumerate(prompts.paraphrases, 1)),
    ]


# --- Answers ---------------------------------------------------------------------------------

# Of uint8 grey images (B, side, side) and what the vision tower makes of them, or of two Nones.
Answer = Callable[[torch.Tensor | None, ModelOutput | None], torch.Tensor]


@dataclass(frozen=True)
class AskedRows:
    """Rows of `images` to ask about, int64 (n,), with the modality of each, (n,).

    ``others``: a row of another patient for each, int64 (n,), for the condition with that image.
    """

    images: ImageStore
    rows: np.ndarray
    modalities: Sequence[str]
    others: np.ndarray | None = None


@dataclass(frozen=True)
class Asker:
    """A model with the questions that it is asked.

    With a ``head``, the answer is not in words: it classifies the last token's hidden state.
    """

    accelerator: Accelerator
    vlm: Vlm
    prompts: VlmPrompts
    settings: AskingSettings
    batch_size: int
    head: nn.Linear | None = None

    def ask(
        self, data: AskedRows, conditions: Sequence[Condition], journal: Journal | None = None
    ) -> np.ndarray:
        """Return the log-likelihood of each class in each condition, float64 (n, conditions, 3).

        A class that free text names has 0 and the others minus infinity; all are NaN if it names
        none.
        """
        answers = {m: [(c, self._answerer(c, m)) for c in conditions] for m in MODALITIES}
        modality_of = dict(zip(data.rows.tolist(), data.modalities, strict=True))
        other_of = {} if data.others is None else dict(zip(data.rows, data.others, strict=True))

        def function(rows: np.ndarray) -> torch.Tensor:
            shown = {"own": data.images.take(rows), "none": None}
            if other_of:
                shown["other"] = data.images.take(np.array([other_of[row] for row in rows]))
            seen = {name: self._encode(images) for name, images in shown.items()}
            found = [
                answer(shown[c.image], seen[c.image]).expand(len(rows), -1)
                for c, answer in answers[modality_of[rows[0]]]
            ]
            return torch.stack(found, 1)

        modalities = np.asarray(data.modalities)
        groups = [data.rows[modalities == modality] for modality in MODALITIES]
        batches = [batch for rows in groups for batch in in_batches(rows, self.batch_size)]
        found = infer(self.accelerator, batches, function, journal)
        return np.array([found[row] for row in data.rows.tolist()], np.float64)

    def _encode(self, images: torch.Tensor | None) -> ModelOutput | None:
        if images is None or self.settings.method == "generate":
            return None
        return encode(self.vlm, images)

    def _answerer(self, condition: Condition, modality: str) -> Answer:
        """Return a function from images to the log-likelihood of each class, (B, 3)."""
        text = self.prompts.ask(modality, condition.question, condition.order)
        if self.settings.method == "generate":
            return lambda images, _: self._by_text(images, text)
        question = self.prepare(text, condition.image != "none")
        return lambda _, seen: self.score(seen, question)

    def prepare(self, text: str, image: bool = True, share: bool = True) -> Question:
        """Prepare the question `text`; see `prepare_question`."""
        answers = [] if self.head else self.prompts.spellings()
        return prepare_question(self.vlm, text, answers, image, share)

    def score(self, seen: ModelOutput | None, question: Question) -> torch.Tensor:
        """Return the log-likelihood of each class for encoded images, (B, 3)."""
        if self.head:
            hidden = read(self.vlm, seen, question).last_hidden_state[:, -1]
            return linear(self.head, hidden).log_softmax(1)
        return class_likelihoods(self.vlm, seen, question)

    def _by_text(self, images: torch.Tensor | None, text: str) -> torch.Tensor:
        said = generate_answers(self.vlm, images, text, self.settings.max_new_tokens)
        answers = self.prompts.answers.model_dump()
        named = [parse_answer(own, answers) for own in said]
        rows = [
            [0.0 if label == own else -inf for label in LABELS] if own else [nan] * len(LABELS)
            for own in named
        ]
        return torch.tensor(rows, dtype=torch.float64)


def probabilities(likelihoods: np.ndarray) -> list[list[float] | None]:
    """Return class probabilities from log-likelihoods, (n, 3); None for an answer that names none.

    They are those of a model that has to answer with one of the classes.
    """
    shifted = np.exp(likelihoods - likelihoods.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    return [None if np.isnan(own).any() else own.tolist() for own in shares]


def covered(likelihoods: np.ndarray) -> np.ndarray:
    """Return the probability that the model gives any of the answers, float64 (n,).

    If it is small, the model did not take the question, and how the rest is shared says little.
    """
    return np.nan_to_num(np.exp(likelihoods)).sum(axis=1)
