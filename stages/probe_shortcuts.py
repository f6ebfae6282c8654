"""Let the fine-tuned SigLIP answer test images of which only a part is visible.

A model that still answers well with the lungs hidden has learned the scanner, not the disease.

Reads   data/manifest.csv, data/images.npy, data/split.csv, models/finetune_siglip/
Writes  data/predictions/probes/<probe>.csv     one row an image of the test split
        data/predictions/probes/<probe>.json    device, precision, seed, versions

    python stages/probe_shortcuts.py        (or: dvc repro probe_shortcuts)
    accelerate launch stages/probe_shortcuts.py        on several GPUs
"""

import chest.early  # noqa: F401

from collections.abc import Callable
from functools import cache

import torch
from scipy.special import softmax

from chest import predictions
from chest.compute import find_checkpoint, load_normalization, record, start
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.files import replacing
from chest.params import load_params
from chest.regions import HIDDEN, visible_region
from chest.resident import place_images
from chest.siglip import Input, classify_rows, load_trained
from chest.systems import PROBES


def main() -> None:
    params = load_params()
    data = read_dataset("test", side=params.image_size)
    accelerator = start(params.seed)
    source = find_checkpoint(str(predictions.TRAINED_MODEL), "main")
    model = load_trained(source, params.image_size).to(accelerator.device)
    rows = data.rows("test")
    images = place_images(data.images, accelerator.device)
    asked = Input(images, rows, load_normalization(source))
    size = 2 * params.chosen.finetune_siglip.batch_size
    answers = {
        probe: softmax(classify_rows(accelerator, model, asked, size, hide(probe)), axis=1)
        for probe in PROBES
    }
    if accelerator.is_main_process:
        made_by = record(accelerator, source, model, params.seed, len(rows))
        with replacing(predictions.PROBES) as folder:
            folder.mkdir()
            for probe, probabilities in answers.items():
                table = predictions.tabulate(data.table.iloc[rows], probabilities)
                predictions.write(probe, table, made_by, folder)
    accelerator.end_training()


def hide(probe: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that hides from grey images, (B, 1, side, side), what the probe does not show."""

    @cache
    def region(side: int, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(visible_region(probe, side)).to(device)

    def change(images: torch.Tensor) -> torch.Tensor:
        return torch.where(region(images.shape[-1], images.device), images, HIDDEN)

    return change


if __name__ == "__main__":
    run_stage(main)
