"""Probe Qwen2.5-VL along the way: does the tower not see, or does the language model not say?

A logistic regression on the features after the vision tower, after the merger, and after a few
layers of the language model. Where it falls, the class is lost.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, the checkpoint
Writes  data/layers/zeroshot_qwen/<layer>.npy    float32 (N, d); row i is the manifest's row i
        data/layers/zeroshot_qwen.csv            UAR of each layer's probe on the test split

    python stages/probe_vlm.py        (or: dvc repro probe_vlm)
    accelerate launch stages/probe_vlm.py        on several GPUs
"""

from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.files import replacing, write_table
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation.layers import FOLDER, score_layers
from chest.models.common.image_store import place_images
from chest.models.vlm.asking import AskedRows, VlmSettings
from chest.models.vlm.layers import extract_layers
from chest.models.vlm.zeroshot import load_asker

SYSTEM = "zeroshot_qwen"


def main() -> None:
    params = load_params()
    settings = params.system(SYSTEM, VlmSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    asker = load_asker(params, settings)
    images = place_images(data.images, asker.accelerator.device)
    rows = np.arange(len(data.table))
    features = extract_layers(asker, AskedRows(images, rows, data.table["modality"].to_numpy()))

    if asker.accelerator.is_main_process:
        with replacing(FOLDER / SYSTEM) as folder:
            write_features(folder, features)
        scores = pd.DataFrame(score_layers(features, data.table, params.seed))
        write_table(FOLDER / f"{SYSTEM}.csv", scores, float_format="%.4f")
    asker.accelerator.end_training()


def write_features(folder: Path, features: dict[str, np.ndarray]) -> None:
    """Write the features of each layer."""
    folder.mkdir()
    for name, values in features.items():
        np.save(folder / f"{name}.npy", values)


if __name__ == "__main__":
    run_stage(main)
