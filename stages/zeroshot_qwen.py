"""Ask Qwen2.5-VL what each image shows: COVID-19, tuberculosis or normal lungs.

Reads   data/manifest.csv, data/images.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_qwen.csv    one row an image of the test split (or of all)
        data/predictions/zeroshot_qwen.json   checkpoint, device, precision, seed, versions
        .resume/zeroshot_qwen/                answers already given, until the stage is done

    python stages/zeroshot_qwen.py        (or: dvc repro zeroshot_qwen)
    accelerate launch stages/zeroshot_qwen.py        on several GPUs
"""

import chest.early  # noqa: F401

from chest import predictions
from chest.compute import find_checkpoint, record, start
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.labels import SPLITS
from chest.params import load_params
from chest.qwen import Asked, ask_rows, load_reader
from chest.resident import place_images
from chest.resume import open_journal, origin_of

SYSTEM = "zeroshot_qwen"


def main() -> None:
    params = load_params()
    settings = params.chosen.zeroshot_qwen
    splits = SPLITS if settings.images == "all" else ("test",)
    data = read_dataset(*splits, side=params.image_size)
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    reader = load_reader(source, params.image_size, accelerator)

    rows = data.rows(*splits)
    images = place_images(data.images, accelerator.device)
    modalities = data.table["modality"].to_numpy()[rows]
    asked = Asked(images, rows, modalities, params.prompts.qwen, settings)
    origin = origin_of(accelerator, source, {
        "image_size": params.image_size, **params.prompts.qwen.model_dump(),
        **settings.model_dump(),
    })  # fmt: skip
    journal = open_journal(accelerator, SYSTEM, origin)
    answers = ask_rows(accelerator, reader, asked, journal)

    if accelerator.is_main_process:
        table = predictions.tabulate(data.table.iloc[rows], answers)
        made_by = record(accelerator, source, reader.model, params.seed, len(rows))
        predictions.write(SYSTEM, table, {**made_by, "method": settings.method})
        journal.clear()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
