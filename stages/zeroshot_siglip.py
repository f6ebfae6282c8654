"""Compare each image with prompts for COVID-19, normal and tuberculosis, by SigLIP.

Reads   data/manifest.csv, data/images.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_siglip.csv    one row an image of the test split (or of all)
        data/predictions/zeroshot_siglip.json   checkpoint, device, precision, seed, versions
        .resume/zeroshot_siglip/                answers already given, until the stage is done

    python stages/zeroshot_siglip.py        (or: dvc repro zeroshot_siglip)
    accelerate launch stages/zeroshot_siglip.py        on several GPUs
"""

import chest.early  # noqa: F401

from chest import predictions
from chest.compute import find_checkpoint, load_normalization, record, start
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.labels import SPLITS
from chest.params import load_params
from chest.resident import place_images
from chest.resume import open_journal, origin_of
from chest.siglip import Input, class_embeddings, compare_rows, load_for_prompts

SYSTEM = "zeroshot_siglip"


def main() -> None:
    params = load_params()
    settings = params.chosen.zeroshot_siglip
    splits = SPLITS if settings.images == "all" else ("test",)
    data = read_dataset(*splits, side=params.image_size)
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    model, tokenizer = load_for_prompts(source, params.image_size)
    model.to(accelerator.device)

    # The prompts' side once, then the images'.
    classes = class_embeddings(model, tokenizer, params.prompts.siglip.model_dump())
    rows = data.rows(*splits)
    images = place_images(data.images, accelerator.device)
    asked = Input(images, rows, load_normalization(source))
    origin = origin_of(accelerator, source, {
        "image_size": params.image_size, **params.prompts.siglip.model_dump(),
        **settings.model_dump(),
    })  # fmt: skip
    journal = open_journal(accelerator, SYSTEM, origin)
    answers = compare_rows(accelerator, model, classes, asked, settings.batch_size, journal)

    if accelerator.is_main_process:
        table = predictions.tabulate(data.table.iloc[rows], answers)
        predictions.write(SYSTEM, table, record(accelerator, source, model, params.seed, len(rows)))
        journal.clear()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
