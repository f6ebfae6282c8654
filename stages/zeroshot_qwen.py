"""Ask Qwen2.5-VL what each image shows: COVID-19, tuberculosis or normal lungs.

Reads   data/manifest.csv, data/images.npy, data/split.csv, the checkpoint
Writes  data/predictions/zeroshot_qwen.csv    one row an image of the test split (or of all)
        data/predictions/zeroshot_qwen.json   checkpoint, device, precision, seed, versions

    python stages/zeroshot_qwen.py        (or: dvc repro zeroshot_qwen)
    accelerate launch stages/zeroshot_qwen.py        on several GPUs
"""

import numpy as np
import torch

from chest import predictions
from chest.compute import answer, find_checkpoint, in_batches, record, start
from chest.dataset import Dataset, read_dataset
from chest.errors import run_stage
from chest.labels import LABELS, MODALITIES, SPLITS
from chest.params import Params, load_params
from chest.qwen import (
    Reader,
    answer_likelihoods,
    generate_answers,
    load_reader,
    parse_answer,
    visual_tokens,
)

SYSTEM = "zeroshot_qwen"


def main() -> None:
    params = load_params()
    settings = params.chosen.zeroshot_qwen
    data = read_dataset()
    accelerator = start(params.seed)
    source = find_checkpoint(settings.checkpoint, settings.revision)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    reader = load_reader(source, accelerator.device, dtype)
    visual_tokens(reader, params.image_size)

    # Images of one modality are asked with the same words: batches of equal rows, no padding.
    rows = data.rows(*SPLITS if settings.images == "all" else ["test"])
    modality = data.table["modality"].to_numpy()
    batches = [
        batch
        for kind in MODALITIES
        for batch in in_batches(rows[modality[rows] == kind], settings.batch_size)
    ]
    answers = answer(
        accelerator, batches, lambda batch: ask(reader, params, data, batch, modality[batch[0]])
    )

    if accelerator.is_main_process:
        given = [answers[row] for row in rows.tolist()]
        unparsed = np.array([probabilities is None for probabilities in given])
        equal = [1 / len(LABELS)] * len(LABELS)
        table = predictions.tabulate(
            data.table.iloc[rows], np.array([equal if p is None else p for p in given]), unparsed
        )
        made_by = record(accelerator, source, reader.model, params.seed, len(rows))
        predictions.write(SYSTEM, table, {**made_by, "method": settings.method})
    accelerator.end_training()


def ask(
    reader: Reader, params: Params, data: Dataset, batch: np.ndarray, modality: str
) -> list[list[float] | None]:
    """Probabilities of the classes for each row of `batch`; None where no class was named."""
    settings, prompts = params.chosen.zeroshot_qwen, params.prompts.qwen
    question = prompts.question.format(modality=getattr(prompts.modality, modality))
    answers = {label: getattr(prompts.answers, label) for label in LABELS}
    images = data.images[batch]
    if settings.method == "likelihood":
        scores = answer_likelihoods(reader, images, question, list(answers.values()))
        return scores.softmax(1).tolist()
    said = generate_answers(reader, images, question, settings.max_new_tokens)
    named = [parse_answer(text, answers) for text in said]
    return [None if name is None else [float(label == name) for label in LABELS] for name in named]


if __name__ == "__main__":
    run_stage(main)
