"""SigLIP by prompts, zero-shot or fine-tuned, ready to classify new images."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from chest.core.labels import MODALITIES
from chest.models.common.checkpoints import Source
from chest.models.common.device import describe_run, float_type
from chest.models.common.image_store import place_images
from chest.models.common.pixels import to_pixels
from chest.models.explain import relevance_of_prompts
from chest.models.predictor import Predictor, Probabilities
from chest.models.siglip import PromptClassifier, compare_rows


def prompt_predictor(
    accelerator: Accelerator,
    source: Source,
    classifier: PromptClassifier,
    image_size: int,
    batch_size: int,
    identity: dict[str, str],
) -> Predictor:
    """Return a system that compares images with the prompts of `classifier`.

    `identity`: name and kind of its record.
    """

    def classify(images: np.ndarray, rows: np.ndarray, modalities: Sequence[str]) -> Probabilities:
        placed = place_images(images, accelerator.device)
        return compare_rows(accelerator, classifier, placed, rows, modalities, batch_size)

    def explain(images: np.ndarray, classes: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
        grey = torch.from_numpy(images).to(accelerator.device)
        pixels = to_pixels(grey, classifier.normalization, dtype=float_type(accelerator))
        texts = [classifier.classes[MODALITIES.index(told)] for told in modalities]
        parts = zip(pixels.split(1), texts, np.split(classes, len(classes)), strict=True)
        return np.concatenate([relevance_of_prompts(classifier.model, *own) for own in parts])

    def describe(n: int) -> dict:
        run = describe_run(accelerator, source, classifier.model, None)
        return {**identity, "n": n, **run}

    return Predictor(image_size, True, classify, describe, explain)
