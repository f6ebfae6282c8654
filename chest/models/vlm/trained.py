"""Fine-tuned vision-language models in ``models/<system>/``, ready to classify new images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chest.core.params import Params
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.image_store import place_images
from chest.models.predictor import Predictor, Probabilities
from chest.models.trained import BATCH_SIZE, load_preprocessing, load_show
from chest.models.vlm.adapter import load_adapter
from chest.models.vlm.asking import AskedRows, asked, probabilities


def load_adapted_predictor(folder: Path, params: Params) -> Predictor:
    """Load the adapters in `folder`, ``models/<system>/``, onto the checkpoint that they adapt.

    Raises ChestError if they are missing or damaged, and CheckpointError for the checkpoint.
    """
    slices, view = load_preprocessing(folder)
    accelerator = start(None, params.system("precision", Precision))
    asker, answering = load_adapter(accelerator, folder, BATCH_SIZE)
    show = load_show(accelerator, folder, view)

    def classify(images: np.ndarray, rows: np.ndarray, modalities: Sequence[str]) -> Probabilities:
        about = AskedRows(place_images(images, accelerator.device), rows, modalities)
        found = asker.ask(about, [asked(asker.prompts)])[:, 0]
        return probabilities(found / answering.temperature)

    def describe(n: int) -> dict:
        run = describe_run(accelerator, asker.vlm.source, asker.vlm.model, None)
        return {"name": folder.name, "kind": "trained", "n": n, **run}

    return Predictor(answering.image_size, True, classify, describe, show=show, slices=slices)
