"""Compute the features of all images by a frozen encoder, once.

ENCODER is one of `extract_features` in params.yaml: siglip, efficientnet_b0, resnet50, and so on.

Reads   data/manifest.csv, data/images/<side>.npy, data/split.csv, data/masks/, the checkpoint
Writes  data/features/<encoder>.npy     float32 (N, d); row i is the manifest's row i
        data/features/<encoder>.json    checkpoint, device, precision, versions

    python stages/extract_features.py siglip        (or: dvc repro extract_features@siglip)
    accelerate launch stages/extract_features.py siglip        on several GPUs
"""

from pathlib import Path

import numpy as np

from chest.core.files import replacing, write_json
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.image_store import place_images
from chest.models.common.view_masks import read_view_masks
from chest.models.encoders import EncoderSettings, extract, load_encoder

FEATURES = Path("data/features")


def main(name: str) -> None:
    params = load_params()
    settings = params.system(f"extract_features.{name}", EncoderSettings)
    data = read_dataset(side=settings.image_size)
    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    encoder = load_encoder(accelerator, source, settings.image_size, settings.pooling)
    masks, _ = read_view_masks(data.table, settings.image_size, settings.view, params.seed)
    images = place_images(data.images, accelerator.device, masks, settings.view)

    rows = np.arange(len(data.table))
    features = extract(accelerator, encoder, images, rows, settings.batch_size)

    if accelerator.is_main_process:
        with replacing(FEATURES / f"{name}.npy") as path, open(path, "wb") as file:
            np.save(file, features.astype(np.float32))
        run = describe_run(accelerator, source, encoder.model, None)
        view = settings.view.model_dump(exclude_defaults=True)
        write_json(FEATURES / f"{name}.json", run | {"image_size": settings.image_size} | view)
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main, argument="ENCODER")
