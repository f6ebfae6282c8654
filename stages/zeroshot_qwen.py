"""Ask Qwen2.5-VL what each image shows: COVID-19, tuberculosis or normal lungs.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_qwen.csv    a row per image of validation, test and external
        data/predictions/zeroshot_qwen.json   checkpoint, device, precision, versions
        data/controls/zeroshot_qwen.csv       the answers without the image, in other words, ...
        .resume/zeroshot_qwen/                answers so far, until the stage is done

    python stages/zeroshot_qwen.py        (or: dvc repro zeroshot_qwen)
    accelerate launch stages/zeroshot_qwen.py        on several GPUs
"""

from chest.core.params import Params, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import FOLDER, Record, read_record
from chest.models.common.device import describe_run
from chest.models.common.image_store import place_images
from chest.models.predictor import Predictor
from chest.models.vlm.asking import VlmSettings
from chest.models.vlm.controls import ask_with_controls, describe_prior, parse_prior
from chest.models.vlm.zeroshot import (
    describe_asking,
    load_asker,
    open_answers,
    zeroshot_predictor,
)

SYSTEM = "zeroshot_qwen"
NAME = "Qwen2.5-VL, zero-shot"


def main() -> None:
    params = load_params()
    settings = params.system(SYSTEM, VlmSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    rows = data.rows(*settings.splits)

    asker = load_asker(params, settings)
    accelerator, vlm = asker.accelerator, asker.vlm
    images = place_images(data.images, accelerator.device)
    journal = open_answers(SYSTEM, asker)
    replies = ask_with_controls(asker, images, data, rows, journal)

    if accelerator.is_main_process:
        run = describe_run(accelerator, vlm.source, vlm.model, None)
        details = describe_asking(asker) | describe_prior(settings.correction, replies.prior)
        record = Record(name=NAME, kind="zero-shot", n=len(rows), **run, details=details)
        write_answers(SYSTEM, data.table.iloc[rows], replies.tabulate(), record)
        journal.clear()
    accelerator.end_training()


def load_predictor(params: Params) -> Predictor:
    """Load the system for tools/predict.py."""
    settings = params.system(SYSTEM, VlmSettings)
    prior = None
    if settings.prior == "unlabelled":  # of the study's training images
        prior = parse_prior(read_record(FOLDER / f"{SYSTEM}.json").details)
    return zeroshot_predictor(NAME, params, settings, prior)


if __name__ == "__main__":
    run_stage(main)
