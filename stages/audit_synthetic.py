"""Compare the synthetic images with real ones: which are copies, and how alike are the others?

Reads   data/synthetic/, data/manifest.csv, data/split.csv, data/images/<side>.npy, the checkpoint
Writes  data/synthetic_audit.csv    the nearest training and test image of each; training on
                                    synthetic images leaves out those that are `dropped`
        data/synthetic_audit.json   near-copies, membership test, KID, precision, recall, probe

Validation images measure quality, test images only whether a generator saw them. External images
are not read. See chest/evaluation/synthetic.py.

    python stages/audit_synthetic.py        (or: dvc repro audit_synthetic)
"""

import numpy as np
import pandas as pd
from accelerate import Accelerator

from chest.core.files import write_json, write_table
from chest.core.params import Positive, Section, Text, load_params
from chest.core.runtime import run_stage
from chest.data.audit import perceptual_hashes
from chest.data.dataset import Dataset, read_dataset
from chest.data.synthetic import AUDIT_COLUMNS, SYNTHETIC_AUDIT, read_synthetic
from chest.evaluation.metrics import rounded
from chest.evaluation.synthetic import (
    FIGURES,
    Described,
    Limits,
    audit_figures,
    find_copies,
    standardize,
)
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, start
from chest.models.common.image_store import place_images
from chest.models.encoders import Encoder, Pooling, extract, load_encoder


class AuditSettings(Section):
    """The block ``audit_synthetic``."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    pooling: Pooling = "mean"
    batch_size: Positive
    near_copy: Limits


def main() -> None:
    params = load_params()
    settings = params.system("audit_synthetic", AuditSettings)
    made = Dataset(*read_synthetic(settings.image_size))
    if made.table.empty:
        write_table(SYNTHETIC_AUDIT, pd.DataFrame(columns=list(AUDIT_COLUMNS)))
        write_json(FIGURES, {"n": 0})
        return
    data = read_dataset("train", "val", "test", side=settings.image_size)
    alike = data.table["modality"].isin(made.table["modality"])
    rows = np.flatnonzero(alike & (data.table["split"] != "external"))
    real = Dataset(data.table.iloc[rows].reset_index(drop=True), data.images[rows])

    accelerator = start(None, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    encoder = load_encoder(accelerator, source, settings.image_size, settings.pooling)
    known, own = standardize(
        *(describe(accelerator, encoder, part, settings.batch_size) for part in (real, made))
    )

    found = find_copies(known, own, settings.near_copy)
    figures = audit_figures(known, own, found, settings.near_copy, params.seed)
    if accelerator.is_main_process:
        write_table(SYNTHETIC_AUDIT, found)
        write_json(FIGURES, rounded(figures))
        print(
            f"synthetic images: {len(found):,}, dropped as near-copies: {found['dropped'].sum():,}"
        )
    accelerator.end_training()


def describe(
    accelerator: Accelerator, encoder: Encoder, images: Dataset, batch_size: int
) -> Described:
    """Compute features and hashes of all `images`."""
    store, rows = place_images(images.images, accelerator.device), np.arange(len(images.table))
    features = extract(accelerator, encoder, store, rows, batch_size)
    return Described(images.table, features, perceptual_hashes(images.images))


if __name__ == "__main__":
    run_stage(main)
