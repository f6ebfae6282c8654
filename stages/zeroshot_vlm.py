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
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import FOLDER, Record, read_record
from chest.models.predictor import Predictor
from chest.models.vlm.asking import NamedVlmSettings
from chest.models.vlm.controls import parse_prior
from chest.models.vlm.zeroshot import answer_dataset, zeroshot_predictor


def main(model: str) -> None:
    params, system = load_params(), f"zeroshot_{model}"
    settings = params.system(f"zeroshot_vlm.{model}", NamedVlmSettings)
    answered = answer_dataset(params, system, settings)
    if answered.accelerator.is_main_process:
        record = Record(name=settings.name, kind="zero-shot", n=len(answered.table), **answered.run)
        write_answers(system, answered.table, answered.replies.tabulate(), record)
        answered.journal.clear()
    answered.accelerator.end_training()


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
