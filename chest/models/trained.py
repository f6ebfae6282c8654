"""Trained models in ``models/<system>/``, ready to classify new images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import ValidationError

from chest.core.errors import ChestError
from chest.core.labels import MODALITIES
from chest.core.params import Params
from chest.data.masks import measure, segment_ct
from chest.data.volumes import Slices
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.classification import ImageRows, classify_rows
from chest.models.common.device import Precision, describe_run, float_type, start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_image_size, load_normalization, to_pixels
from chest.models.common.preprocessing import KEYS, PREPROCESSING
from chest.models.common.views import View, show
from chest.models.encoders import load_trained
from chest.models.explain import relevance_of_classifier
from chest.models.lungs import LungSegmenter, load_segmenter
from chest.models.predictor import Predictor, Probabilities, Shown
from chest.models.prompting import prompt_predictor
from chest.models.siglip import PROMPTS, SiglipPrompts, load_prompt_classifier

BATCH_SIZE = 64  # at most; halved if it does not fit into the device's memory
SEGMENTER = "segment_lungs"  # beside the model's folder


def load_trained_predictor(folder: Path, params: Params) -> Predictor:
    """Load a trained model from `folder`, ``models/<system>/``.

    Raises CheckpointError if it is missing, incomplete, or no classifier of LABELS, and ChestError
    if it does not say how its images were made.
    """
    slices, view = load_preprocessing(folder)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(str(folder), "main")
    image_size, normalization = load_image_size(source), load_normalization(source)
    model = load_trained(source, float_type(accelerator)).to(accelerator.device)

    def classify(images: np.ndarray, rows: np.ndarray, modalities: Sequence[str]) -> Probabilities:
        placed = place_images(images, accelerator.device)
        data = ImageRows(placed, rows, normalization, as_numbers(modalities))
        logits = classify_rows(accelerator, model, data, BATCH_SIZE)
        return torch.from_numpy(logits).softmax(1).tolist()

    def explain(images: np.ndarray, classes: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
        grey = torch.from_numpy(images).to(accelerator.device)
        pixels = to_pixels(grey, normalization, dtype=float_type(accelerator))
        return relevance_of_classifier(model, pixels, classes, as_numbers(modalities))

    def describe(n: int) -> dict:
        run = describe_run(accelerator, source, model, None)
        return {"name": folder.name, "kind": "trained", "n": n, **run}

    return Predictor(
        image_size=image_size,
        needs_modality=model.config.head != "shared" or view.needs_masks,
        classify=classify,
        describe=describe,
        explain=explain,
        show=load_show(accelerator, folder, view),
        slices=slices,
    )


def load_prompted_predictor(folder: Path, params: Params) -> Predictor:
    """Load a SigLIP that was trained on prompts from `folder`, with these prompts.

    Raises ChestError as `load_trained_predictor` does.
    """
    slices, view = load_preprocessing(folder)
    try:
        prompts = SiglipPrompts(**json.loads((folder / PROMPTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        remedy = "train the model again (dvc repro)"
        raise ChestError(f"{folder / PROMPTS}: missing or damaged; {remedy}") from None
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(str(folder), "main")
    image_size = load_image_size(source)
    classifier = load_prompt_classifier(accelerator, source, image_size, prompts)
    identity = {"name": folder.name, "kind": "trained"}
    predictor = prompt_predictor(accelerator, source, classifier, image_size, BATCH_SIZE, identity)
    return replace(predictor, show=load_show(accelerator, folder, view), slices=slices)


def load_show(
    accelerator: Accelerator, folder: Path, view: View
) -> Callable[[np.ndarray, Sequence[str]], Shown] | None:
    """Return what shows new images through the `view` of the model in `folder`.

    None for a model that sees them as they are.
    """
    if view.shows_all:
        return None
    segmenter = None
    if view.needs_masks:
        segmenter = load_segmenter(accelerator, folder.parent / SEGMENTER)
    return partial(show_images, accelerator, segmenter, view)


def as_numbers(modalities: Sequence[str]) -> np.ndarray:
    """Return the position of each modality in MODALITIES, int64 (n,); 0 for one not told.

    A model that is not told the modality has a shared head, which does not ask for it.
    """
    return np.array([MODALITIES.index(name) if name else 0 for name in modalities], np.int64)


def show_images(
    accelerator: Accelerator,
    segmenter: LungSegmenter | None,
    view: View,
    images: np.ndarray,
    modalities: Sequence[str],
) -> Shown:
    """Find the lungs in new uint8 `images`, (n, side, side), if needed, and apply `view`."""
    masks = np.ones(images.shape, bool)
    accepted = np.ones(len(images), bool)
    if segmenter:
        for i, modality in enumerate(modalities):
            placed = torch.from_numpy(images[i : i + 1]).to(accelerator.device)
            xray = modality == "xray"
            found = segmenter.segment(placed)[0] if xray else segment_ct(images[i])
            accepted[i] = measure(found).accepted
            masks[i] = found | ~accepted[i]
    shown, lungs = apply_view(view, images, masks)
    answered = accepted if view.rejected == "unanswered" else np.ones(len(images), bool)
    return Shown(shown, lungs, accepted, answered)


def apply_view(view: View, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what `view` shows of `images`, and the masks cropped as the images are."""
    outline = View(crop=view.crop, masks=view.masks, dilate=view.dilate)
    lungs = torch.from_numpy(masks)
    shown = show(torch.from_numpy(images), lungs, view)
    cropped = show(lungs.to(torch.uint8) * 255, lungs, outline)
    return shown.numpy(), (cropped > 127).numpy()


def load_preprocessing(folder: Path) -> tuple[dict[str, str | float], View]:
    """Return how the slices of the model in `folder` were cut and scaled, and what it is shown."""
    path = folder / PREPROCESSING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        slices = Slices(**content["slices"], verify=True).model_dump(include={*KEYS})
        return slices, View(**content["view"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        remedy = "train the model again (dvc repro), or write it by hand: see docs/bad-input.md"
        raise ChestError(f"{path}: missing or damaged; {remedy}") from None
