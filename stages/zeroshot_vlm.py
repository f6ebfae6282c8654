"""Ask a vision-language model what each image shows.

MODEL is one of `vlms` in params.yaml, with a block in zeroshot_vlm of the profile.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_<model>.csv    a row per image of validation, test and external
        data/predictions/zeroshot_<model>.json   checkpoint, device, precision, versions
        data/controls/zeroshot_<model>.csv   without the image, in other words, ...
        .resume/zeroshot_<model>/                answers so far, until the stage is done

    python stages/zeroshot_vlm.py qwen3        (or: dvc repro zeroshot_vlm@qwen3)
    accelerate launch stages/zeroshot_vlm.py qwen3        on several GPUs
"""

from chest.core.params import Params, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import FOLDER, Record, read_record
from chest.models.common.device import describe_run
from chest.models.common.image_store import place_images
from chest.models.predictor import Predictor
from chest.models.vlm.asking import NamedVlmSettings
from chest.models.vlm.controls import ask_with_controls, describe_prior, parse_prior
from chest.models.vlm.zeroshot import (
    describe_asking,
    load_asker,
    open_answers,
    zeroshot_predictor,
)


def main(model: str) -> None:
    params, system = load_params(), f"zeroshot_{model}"
    settings = params.system(f"zeroshot_vlm.{model}", NamedVlmSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    rows = data.rows(*settings.splits)

    asker = load_asker(params, settings)
    accelerator, vlm = asker.accelerator, asker.vlm
    images = place_images(data.images, accelerator.device)
    journal = open_answers(system, asker)
    replies = ask_with_controls(asker, images, data, rows, journal)

    if accelerator.is_main_process:
        run = describe_run(accelerator, vlm.source, vlm.model, None)
        details = describe_asking(asker) | describe_prior(settings.correction, replies.prior)
        record = Record(name=settings.name, kind="zero-shot", n=len(rows), **run, details=details)
        write_answers(system, data.table.iloc[rows], replies.tabulate(), record)
        journal.clear()
    accelerator.end_training()


def list_systems(params: Params) -> dict[str, str]:
    """Return the models that tools/predict.py can ask, by system."""
    return {f"zeroshot_{model}": model for model in params.system("zeroshot_vlm", dict)}


def load_predictor(params: Params, model: str) -> Predictor:
    """Load a system for tools/predict.py."""
    settings = params.system(f"zeroshot_vlm.{model}", NamedVlmSettings)
    prior = None
    if settings.prior == "unlabelled":  # of the study's training images
        prior = parse_prior(read_record(FOLDER / f"zeroshot_{model}.json").details)
    return zeroshot_predictor(settings.name, params, settings, prior)


if __name__ == "__main__":
    run_stage(main, argument="MODEL")
