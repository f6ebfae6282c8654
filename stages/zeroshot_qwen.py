"""Ask Qwen2.5-VL what each image shows: COVID-19, tuberculosis or normal lungs.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_qwen.csv    a row per image of validation, test and external
        data/predictions/zeroshot_qwen.json   checkpoint, device, precision, versions
        .resume/zeroshot_qwen/                answers so far, until the stage is done

    python stages/zeroshot_qwen.py        (or: dvc repro zeroshot_qwen)
    accelerate launch stages/zeroshot_qwen.py        on several GPUs
"""

from collections.abc import Sequence

import numpy as np

from chest.core.params import Params, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation import predictions
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.journal import open_journal
from chest.models.predictor import Predictor, Probabilities
from chest.models.qwen import AskedRows, QwenPrompts, QwenSettings, ask_rows, load_qwen

SYSTEM = "zeroshot_qwen"
IDENTITY = {"name": "Qwen2.5-VL, zero-shot", "kind": "zero-shot"}


def main() -> None:
    params = load_params()
    settings = params.system(SYSTEM, QwenSettings)
    prompts = params.section("prompts.qwen", QwenPrompts)
    data = read_dataset("val", "test", side=settings.image_size)
    rows = data.rows(*settings.splits)

    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    qwen = load_qwen(accelerator, source, settings.image_size)
    images = place_images(data.images, accelerator.device)
    asked = AskedRows(images, rows, data.table["modality"].to_numpy()[rows])

    parameters = {"prompts": prompts.model_dump(), "settings": settings.model_dump()}
    origin = fingerprint(accelerator, source, settings.image_size, parameters)
    journal = open_journal(accelerator, SYSTEM, origin)
    answers = ask_rows(accelerator, qwen, asked, prompts, settings, journal)

    if accelerator.is_main_process:
        run = describe_run(accelerator, source, qwen.model, None)
        details = {"method": settings.method}
        record = predictions.Record(**IDENTITY, n=len(rows), **run, details=details)
        predictions.write(SYSTEM, predictions.tabulate(data.table.iloc[rows], answers), record)
        journal.clear()
    accelerator.end_training()


def load_predictor(params: Params) -> Predictor:
    """Load the system for tools/predict.py."""
    settings = params.system(SYSTEM, QwenSettings)
    prompts = params.section("prompts.qwen", QwenPrompts)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    qwen = load_qwen(accelerator, source, settings.image_size)

    def classify(images: np.ndarray, rows: np.ndarray, modalities: Sequence[str]) -> Probabilities:
        asked = AskedRows(place_images(images, accelerator.device), rows, modalities)
        return ask_rows(accelerator, qwen, asked, prompts, settings)

    def describe(n: int) -> dict:
        run = describe_run(accelerator, source, qwen.model, None)
        return {**IDENTITY, "n": n, **run, "details": {"method": settings.method}}

    return Predictor(settings.image_size, True, classify, describe)


if __name__ == "__main__":
    run_stage(main)
