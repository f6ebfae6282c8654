"""Train 50 steps on made images, and write each step's loss: run alone, or by `accelerate launch`.

python tests/launched.py CHECKPOINT LOSSES.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from chest import training
from chest.compute import find_checkpoint, load_normalization, start
from chest.dataset import Dataset
from chest.labels import LABELS
from chest.params import FinetuneSiglip
from chest.resident import place_images
from chest.siglip import load_classifier

SETTINGS = {
    "checkpoint": "x", "revision": "main", "batch_size": 8, "lr": 1e-3, "warmup_steps": 5,
    "epochs": 2, "weight_decay": 0.01, "balance": "class", "calibrate": "none",
    "compile": "none", "save_every": 1000,
    "augment": {"rotate": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2},
}  # fmt: skip


def make_data() -> Dataset:
    """200 training images, brighter from class to class, and 12 for validation."""
    label = np.resize(LABELS, 212)
    split = ["train"] * 200 + ["val"] * 12
    table = pd.DataFrame({"image_id": range(212), "label": label, "modality": "ct", "split": split})
    level = np.resize([30, 110, 190], 212)
    noise = np.random.default_rng(0).integers(0, 60, (212, 224, 224))
    return Dataset(table, (noise + level[:, None, None]).astype(np.uint8))


def main(checkpoint: str, output: str) -> None:
    accelerator, data = start(5), make_data()
    source = find_checkpoint(checkpoint, "main")
    task = training.Task(
        accelerator, load_classifier(source, 224), data,
        place_images(data.images, accelerator.device), load_normalization(source),
        FinetuneSiglip(**SETTINGS),
    )  # fmt: skip
    losses, finish = [], training.finish_epoch

    def note(task, run, score):
        losses.extend(run.losses.tolist())
        finish(task, run, score)

    training.finish_epoch = note
    training.train(task, 5, lambda row: None)
    if accelerator.is_main_process:
        content = {"processes": accelerator.num_processes, "losses": losses}
        Path(output).write_text(json.dumps(content))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
