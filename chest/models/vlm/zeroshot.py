"""A vision-language model as it is, ready to be asked: for stages and for tools/predict.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from accelerate import Accelerator

from chest.core.params import Params
from chest.data.dataset import read_dataset
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.journal import Journal, open_journal
from chest.models.predictor import Predictor, Probabilities
from chest.models.vlm.asking import (
    AskedRows,
    Asker,
    VlmPrompts,
    VlmSettings,
    asked,
    probabilities,
)
from chest.models.vlm.controls import (
    Prior,
    Replies,
    ask_with_controls,
    describe_prior,
    find_prior,
    subtract,
)
from chest.models.vlm.model import load_vlm


def load_asker(params: Params, settings: VlmSettings) -> Asker:
    """Start the accelerator and load the checkpoint that `settings` name."""
    prompts = params.section("prompts.vlm", VlmPrompts)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    vlm = load_vlm(accelerator, source, settings.image_size)
    return Asker(accelerator, vlm, prompts, settings, settings.batch_size)


def open_answers(system: str, asker: Asker) -> Journal:
    """Open the journal of `system`, in which an interrupted stage keeps its answers."""
    settings: VlmSettings = asker.settings
    parameters = {"prompts": asker.prompts.model_dump(), "settings": settings.model_dump()}
    source, side = asker.vlm.source, settings.image_size
    origin = fingerprint(asker.accelerator, source, side, parameters)
    return open_journal(asker.accelerator, system, origin)


@dataclass(frozen=True)
class Answered:
    """Replies to the images of ``table``, and the fields of their record (``run``)."""

    accelerator: Accelerator
    table: pd.DataFrame
    replies: Replies
    run: dict
    journal: Journal


def answer_dataset(params: Params, system: str, settings: VlmSettings) -> Answered:
    """Ask the checkpoint that `settings` name about the images of their splits, with controls."""
    data = read_dataset("train", "val", "test", side=settings.image_size)
    rows = data.rows(*settings.splits)
    asker = load_asker(params, settings)
    images = place_images(data.images, asker.accelerator.device)
    journal = open_answers(system, asker)
    replies = ask_with_controls(asker, images, data, rows, journal)
    run = describe_run(asker.accelerator, asker.vlm.source, asker.vlm.model, None)
    run["details"] = describe_asking(asker) | describe_prior(settings.correction, replies.prior)
    return Answered(asker.accelerator, data.table.iloc[rows], replies, run, journal)


def zeroshot_predictor(
    name: str, params: Params, settings: VlmSettings, prior: Prior | None = None
) -> Predictor:
    """Return a system that asks the checkpoint that `settings` name.

    `prior` is needed where it comes from the study's training images (``unlabelled``).
    """
    asker = load_asker(params, settings)
    kind = settings.correction
    if kind != "unlabelled":
        prior = find_prior(kind, asker, [asked(asker.prompts)])
    classify = partial(classify_images, asker, prior)

    def describe(n: int) -> dict:
        run = describe_run(asker.accelerator, asker.vlm.source, asker.vlm.model, None)
        return {"name": name, "kind": "zero-shot", "n": n, **run, "details": describe_asking(asker)}

    return Predictor(settings.image_size, True, classify, describe)


def classify_images(
    asker: Asker, prior: Prior, images: np.ndarray, rows: np.ndarray, modalities: Sequence[str]
) -> Probabilities:
    """Return the class probabilities of `rows` of uint8 `images`, (N, side, side)."""
    placed = place_images(images, asker.accelerator.device)
    found = asker.ask(AskedRows(placed, rows, modalities), [asked(asker.prompts)])[:, 0]
    return probabilities(subtract(found, prior, modalities))


def describe_asking(asker: Asker) -> dict[str, str | int]:
    """Return the details of a predictions record that say how the model was asked."""
    return {
        "method": asker.settings.method,
        "side_read": asker.vlm.side,
        "image_tokens": asker.vlm.image_tokens,
    }
