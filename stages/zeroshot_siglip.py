"""Compare each image with prompts for COVID-19, normal and tuberculosis, by SigLIP.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_siglip.csv    a row per image of validation, test and external
        data/predictions/zeroshot_siglip.json   checkpoint, device, precision, versions
        .resume/zeroshot_siglip/                answers so far, until the stage is done

    python stages/zeroshot_siglip.py        (or: dvc repro zeroshot_siglip)
    accelerate launch stages/zeroshot_siglip.py        on several GPUs
"""

from chest.core.params import Params, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation import predictions
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.journal import open_journal
from chest.models.predictor import Predictor
from chest.models.prompting import prompt_predictor
from chest.models.settings import ZeroshotSettings
from chest.models.siglip import SiglipPrompts, compare_rows, load_prompt_classifier

SYSTEM = "zeroshot_siglip"
IDENTITY = {"name": "SigLIP, zero-shot", "kind": "zero-shot"}


def main() -> None:
    params = load_params()
    settings = params.system(SYSTEM, ZeroshotSettings)
    prompts = params.section("prompts.siglip", SiglipPrompts)
    data = read_dataset("val", "test", side=settings.image_size)
    rows = data.rows(*settings.splits)

    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    classifier = load_prompt_classifier(accelerator, source, settings.image_size, prompts)
    images = place_images(data.images, accelerator.device)

    parameters = {"prompts": prompts.model_dump(), "settings": settings.model_dump()}
    origin = fingerprint(accelerator, source, settings.image_size, parameters)
    journal = open_journal(accelerator, SYSTEM, origin)
    modalities = data.table["modality"].to_numpy()[rows]
    answers = compare_rows(
        accelerator, classifier, images, rows, modalities, settings.batch_size, journal
    )

    if accelerator.is_main_process:
        run = describe_run(accelerator, source, classifier.model, None)
        record = predictions.Record(**IDENTITY, n=len(rows), **run)
        predictions.write(SYSTEM, predictions.tabulate(data.table.iloc[rows], answers), record)
        journal.clear()
    accelerator.end_training()


def load_predictor(params: Params) -> Predictor:
    """Load the system for tools/predict.py."""
    settings = params.system(SYSTEM, ZeroshotSettings)
    prompts = params.section("prompts.siglip", SiglipPrompts)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    classifier = load_prompt_classifier(accelerator, source, settings.image_size, prompts)
    size, batch = settings.image_size, settings.batch_size
    return prompt_predictor(accelerator, source, classifier, size, batch, IDENTITY)


if __name__ == "__main__":
    run_stage(main)
