"""Trained models in ``models/<system>/``, ready to classify new images."""

import json
from pathlib import Path

import numpy as np
import torch

from chest.core.errors import ChestError
from chest.core.params import Params
from chest.data.volumes import Slices
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.classification import ImageRows, classify_rows, load_trained
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_image_size, load_normalization, to_pixels
from chest.models.common.preprocessing import KEYS, PREPROCESSING
from chest.models.explain import relevance_of_classifier
from chest.models.predictor import Predictor, Probabilities

BATCH_SIZE = 64  # at most; halved if it does not fit into the device's memory
EXPLANATIONS = {"siglip": relevance_of_classifier}  # by model_type; other models have none


def load_trained_predictor(folder: Path, params: Params) -> Predictor:
    """Load a trained model from `folder`, ``models/<system>/``.

    Raises CheckpointError if it is missing, incomplete, or no classifier of LABELS, and ChestError
    if it does not say how its slices were made.
    """
    slices = load_slices(folder)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(str(folder), "main")
    image_size, normalization = load_image_size(source), load_normalization(source)
    model = load_trained(source, float_type(accelerator)).to(accelerator.device)
    relevance = EXPLANATIONS.get(model.config.model_type)

    def classify(images: np.ndarray, rows: np.ndarray, _) -> Probabilities:
        placed = place_images(images, accelerator.device)
        data = ImageRows(placed, rows, normalization)
        logits = classify_rows(accelerator, model, data, BATCH_SIZE)
        return torch.from_numpy(logits).softmax(1).tolist()

    def explain(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        grey = torch.from_numpy(images).to(accelerator.device)
        pixels = to_pixels(grey, normalization, dtype=float_type(accelerator))
        return relevance(model, pixels, classes)

    def describe(n: int) -> dict:
        run = describe_run(accelerator, source, model, None)
        return {"name": folder.name, "kind": "trained", "n": n, **run}

    explanation = explain if relevance else None
    return Predictor(image_size, False, classify, describe, explanation, slices)


def load_slices(folder: Path) -> dict[str, str | float]:
    """Return how the slices that the model in `folder` was trained on were cut and scaled."""
    path = folder / PREPROCESSING
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["slices"]
        return Slices(**found, verify=True).model_dump(include={*KEYS})
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "train the model again (dvc repro), or write it by hand: see docs/bad-input.md"
        raise ChestError(f"{path}: missing or damaged; {remedy}") from None
