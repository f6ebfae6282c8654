"""Trained models in ``models/<system>/``, ready to answer new images."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from chest.core.errors import printable
from chest.core.params import Params
from chest.models import siglip
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.classification import ImageRows, classify_rows
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_normalization, to_pixels
from chest.models.explain import relevance_of_classifier
from chest.models.predictor import Predictor, Probabilities

BATCH_SIZE = 64  # at most; halved where the device's memory does not hold it
LOADERS = {"siglip": siglip.load_trained}  # by model_type in config.json


def load_trained_predictor(folder: Path, params: Params) -> Predictor:
    """Load a trained model from `folder`, ``models/<system>/``.

    Raises CheckpointError if it is missing, incomplete or of a kind that no loader knows.
    """
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(str(folder), "main")
    model = _load_trained(source, float_type(accelerator)).to(accelerator.device)
    normalization = load_normalization(source)

    def classify(images: np.ndarray, rows: np.ndarray, _) -> Probabilities:
        placed = place_images(images, accelerator.device)
        data = ImageRows(placed, rows, normalization)
        logits = classify_rows(accelerator, model, data, BATCH_SIZE)
        return torch.from_numpy(logits).softmax(1).tolist()

    def explain(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        grey = torch.from_numpy(images).to(accelerator.device)
        pixels = to_pixels(grey, normalization, dtype=float_type(accelerator))
        return relevance_of_classifier(model, pixels, classes)

    def describe(n: int) -> dict:
        run = describe_run(accelerator, source, model, params.seed)
        return {"name": folder.name, "kind": "trained", "n": n, **run}

    return Predictor(model.config.vision_config.image_size, False, classify, describe, explain)


def _load_trained(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    content, _ = source.load(PreTrainedConfig.get_config_dict)
    kind = content.get("model_type")
    if kind not in LOADERS:
        raise source.error(f"no trained model of this kind (model_type: {printable(kind)})")
    return LOADERS[kind](source, dtype=dtype)
