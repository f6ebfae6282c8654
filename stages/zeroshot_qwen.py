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
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import FOLDER, Record, read_record
from chest.models.predictor import Predictor
from chest.models.vlm.asking import VlmSettings
from chest.models.vlm.controls import parse_prior
from chest.models.vlm.zeroshot import answer_dataset, zeroshot_predictor

SYSTEM = "zeroshot_qwen"
NAME = "Qwen2.5-VL, zero-shot"


def main() -> None:
    params = load_params()
    settings = params.system(SYSTEM, VlmSettings)
    answered = answer_dataset(params, SYSTEM, settings)
    if answered.accelerator.is_main_process:
        record = Record(name=NAME, kind="zero-shot", n=len(answered.table), **answered.run)
        write_answers(SYSTEM, answered.table, answered.replies.tabulate(), record)
        answered.journal.clear()
    answered.accelerator.end_training()


def load_predictor(params: Params) -> Predictor:
    """Load the system for tools/predict.py."""
    settings = params.system(SYSTEM, VlmSettings)
    prior = None
    if settings.prior == "unlabelled":  # of the study's training images
        prior = parse_prior(read_record(FOLDER / f"{SYSTEM}.json").details)
    return zeroshot_predictor(NAME, params, settings, prior)


if __name__ == "__main__":
    run_stage(main)
