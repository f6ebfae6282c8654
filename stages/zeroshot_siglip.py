"""Compare each image with prompts for COVID-19, normal and tuberculosis, by SigLIP.

Reads   data/manifest.csv, data/images.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_siglip.csv    one row an image of the test split (or of all)
        data/predictions/zeroshot_siglip.json   checkpoint, device, precision, seed, versions

    python stages/zeroshot_siglip.py        (or: dvc repro zeroshot_siglip)
    accelerate launch stages/zeroshot_siglip.py        on several GPUs
"""

from chest import predictions
from chest.compute import (
    answer,
    find_checkpoint,
    in_batches,
    load_normalization,
    record,
    start,
    to_pixels,
)
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.labels import SPLITS
from chest.params import load_params
from chest.siglip import class_embeddings, load_for_prompts, score

SYSTEM = "zeroshot_siglip"


def main() -> None:
    params = load_params()
    settings = params.chosen.zeroshot_siglip
    data = read_dataset()
    accelerator = start(params.seed)
    device = accelerator.device
    source = find_checkpoint(settings.checkpoint, settings.revision)
    normal = load_normalization(source)
    model, tokenizer = load_for_prompts(source, params.image_size)
    model.to(device)

    # The prompts' side once, then the images'.
    classes = class_embeddings(model, tokenizer, params.prompts.siglip.model_dump())
    rows = data.rows(*SPLITS if settings.images == "all" else ["test"])

    def compare(batch) -> list[list[float]]:
        pixels = to_pixels(data.images[batch], normal, device)
        with accelerator.autocast():
            return score(model, pixels, classes).tolist()

    answers = answer(accelerator, in_batches(rows, settings.batch_size), compare)

    if accelerator.is_main_process:
        table = predictions.tabulate(data.table.iloc[rows], [answers[row] for row in rows.tolist()])
        predictions.write(SYSTEM, table, record(accelerator, source, model, params.seed, len(rows)))
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
