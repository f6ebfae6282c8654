"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): zero-shot, by prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers import SiglipConfig, SiglipModel

from chest.core.errors import ParameterError
from chest.core.labels import LABELS
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

TEXT_LENGTH = 64  # tokens: SigLIP was trained on texts padded to this length


class SiglipPrompts(Section):
    """``prompts.siglip`` in params.yaml: the prompts of each class."""

    covid19: Texts
    normal: Texts
    tuberculosis: Texts


@dataclass(frozen=True)
class PromptClassifier:
    """Both towers of SigLIP; ``classes`` holds the embedding of each class, (3, d)."""

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
    tokens = {label: tokenize(source, tokenizer, getattr(prompts, label)) for label in LABELS}
    model = source.load_model(
        SiglipModel,
        config=config,
        dtype=float_type(accelerator),
        device_map=accelerator.device,
    ).eval()
    return PromptClassifier(model, embed_classes(model, tokens), load_normalization(source))


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
def embed_classes(model: SiglipModel, tokens: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a unit vector for each class, (3, d): the mean of the unit vectors of its prompts."""
    classes = []
    for label in LABELS:
        texts = model.get_text_features(tokens[label].to(model.device)).pooler_output
        classes.append(_unit(_unit(texts).mean(0)))
    return torch.stack(classes)


def compare(
    accelerator: Accelerator, classifier: PromptClassifier, images: torch.Tensor
) -> torch.Tensor:
    """Return the probabilities, (B, 3), of uint8 grey `images` (B, side, side).

    They are the softmax over the classes of the scaled cosine similarities. SigLIP was trained with
    a sigmoid for each pair, whose bias is the same for all classes: the softmax ranks the classes
    as the sigmoids do, and adds up to 1.
    """
    model, dtype = classifier.model, float_type(accelerator)
    pixels = to_pixels(images, classifier.normalization, dtype=dtype)
    with accelerator.autocast():
        features = model.get_image_features(pixels).pooler_output
    # Not in bf16: the scale multiplies a rounding error of a cosine by a hundred.
    cosines = _unit(features.to(dtype)) @ classifier.classes.T
    return torch.softmax(cosines * model.logit_scale.exp(), -1)


def compare_rows(
    accelerator: Accelerator,
    classifier: PromptClassifier,
    images: ImageStore,
    rows: np.ndarray,
    batch_size: int,
    journal: Journal | None = None,
) -> list[list[float]]:
    """Return the class probabilities of each of `rows`, int64 (n,), of `images`."""

    def function(batch: np.ndarray) -> torch.Tensor:
        return compare(accelerator, classifier, images.take(batch))

    answers = infer(accelerator, in_batches(rows, batch_size), function, journal)
    return [answers[row] for row in rows.tolist()]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
