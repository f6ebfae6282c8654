"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): zero-shot, by prompts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import model_validator
from transformers import SiglipConfig, SiglipModel

from chest.core.errors import ParameterError
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Section, Texts
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.journal import Journal
from chest.models.common.pixels import (
    Normalization,
    check_image_size,
    load_normalization,
    to_pixels,
)
from chest.models.settings import Modalities

PROMPTS = "prompts.json"  # beside the weights of a model that was trained on prompts
TEXT_LENGTH = 64  # tokens: SigLIP was trained on texts padded to this length


class SiglipPrompts(Section):
    """``prompts.siglip`` in params.yaml: the prompts of each class.

    Each has a place for the modality: a prompt without it, or with another one, would score what
    kind of picture it is.
    """

    modality: Modalities
    covid19: Texts
    normal: Texts
    tuberculosis: Texts

    @model_validator(mode="after")
    def _names_modality(self):
        for text in (text for label in LABELS for text in getattr(self, label)):
            if re.findall(r"{.*?}|[{}]", text) != ["{modality}"]:
                raise ValueError(f"{text!r}: needs {{modality}} once, and no other braces")
        return self

    def of(self, label: str, modality: str) -> list[str]:
        """Return the prompts of a class for images of `modality`."""
        told = getattr(self.modality, modality)
        return [text.format(modality=told) for text in getattr(self, label)]


@dataclass(frozen=True)
class PromptClassifier:
    """Both towers of SigLIP; ``classes``: embeddings by MODALITIES and LABELS, (2, 3, d)."""

    model: SiglipModel
    classes: torch.Tensor
    normalization: Normalization


def load_prompt_classifier(
    accelerator: Accelerator, source: Source, image_size: int, prompts: SiglipPrompts
) -> PromptClassifier:
    """Load SigLIP on the device and embed the prompts.

    Raises CheckpointError for another kind of checkpoint, and ParameterError if the checkpoint
    reads images of another size or a prompt is too long.
    """
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    tokenizer = source.load_tokenizer()
    tokens = tokenize_prompts(source, tokenizer, prompts)
    model = source.load_model(
        SiglipModel,
        config=config,
        dtype=float_type(accelerator),
        device_map=accelerator.device,
    ).eval()
    return PromptClassifier(model, embed_classes(model, tokens), load_normalization(source))


def tokenize_prompts(source: Source, tokenizer, prompts: SiglipPrompts) -> list[list[torch.Tensor]]:
    """Return the token ids of all prompts by MODALITIES and LABELS, int64 (n, 64) each."""
    return [
        [tokenize(source, tokenizer, prompts.of(label, modality)) for label in LABELS]
        for modality in MODALITIES
    ]


def tokenize(source: Source, tokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 (n, 64); raises ParameterError if a prompt has more tokens.

    Text is lower-cased and padded at its end, as in training. SigLIP's tokenizer does both by
    itself; SigLIP 2's is Gemma's, which does neither. Raises CheckpointError if the tokenizer does
    not close a text with its end token, on which the text tower relies.
    """
    texts = [prompt.lower() for prompt in prompts]
    for prompt, ids in zip(prompts, tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > TEXT_LENGTH:
            raise ParameterError(
                f"prompts.siglip: {prompt!r} has {len(ids)} tokens, at most {TEXT_LENGTH} are read"
            )
        if ids[-1] != tokenizer.eos_token_id:
            raise source.error("its tokenizer does not close a text with an end token")
    padding = {"padding": "max_length", "padding_side": "right", "max_length": TEXT_LENGTH}
    return tokenizer(texts, return_tensors="pt", **padding)["input_ids"]


@torch.inference_mode()
def embed_classes(model: SiglipModel, tokens: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return a unit vector for each class of each modality, (2, 3, d).

    It is the mean of the unit vectors of its prompts, whose `tokens` are int64 (n, 64).
    """
    classes = []
    for prompts in (own for modality in tokens for own in modality):
        texts = model.get_text_features(prompts.to(model.device)).pooler_output
        classes.append(_unit(_unit(texts).mean(0)))
    return torch.stack(classes).view(len(MODALITIES), len(LABELS), -1)


def compare(
    accelerator: Accelerator,
    classifier: PromptClassifier,
    images: torch.Tensor,
    modalities: Sequence[str],
) -> torch.Tensor:
    """Return the probabilities, (B, 3), of uint8 grey `images` (B, side, side) of `modalities`.

    They are the softmax over the classes of the scaled cosine similarities. SigLIP was trained with
    a sigmoid for each pair, whose bias is the same for all classes: the softmax ranks the classes
    as the sigmoids do, and adds up to 1.
    """
    model, dtype = classifier.model, float_type(accelerator)
    pixels = to_pixels(images, classifier.normalization, dtype=dtype)
    with accelerator.autocast():
        features = model.get_image_features(pixels).pooler_output
    own = classifier.classes[[MODALITIES.index(modality) for modality in modalities]]
    # Not in bf16: the scale multiplies a rounding error of a cosine by a hundred.
    cosines = (own @ _unit(features.to(dtype))[..., None])[..., 0]
    return torch.softmax(cosines * model.logit_scale.exp(), -1)


def compare_rows(
    accelerator: Accelerator,
    classifier: PromptClassifier,
    images: ImageStore,
    rows: np.ndarray,
    modalities: Sequence[str],
    batch_size: int,
    journal: Journal | None = None,
) -> list[list[float]]:
    """Return the class probabilities of each of `rows`, int64 (n,), of `images`.

    `modalities` are those of the rows, (n,).
    """
    modality_of = dict(zip(rows.tolist(), modalities, strict=True))

    def function(batch: np.ndarray) -> torch.Tensor:
        told = [modality_of[row] for row in batch.tolist()]
        return compare(accelerator, classifier, images.take(batch), told)

    answers = infer(accelerator, in_batches(rows, batch_size), function, journal)
    return [answers[row] for row in rows.tolist()]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
