"""Train a linear model on each region of the images alone: does the border tell the class?

The regions are the whole image, the lungs, all but the lungs, the border, and the mask's shape; the
features are pooled pixels (28 x 28) or, where params.yaml names a checkpoint, those of a frozen
encoder. See chest/evaluation/probes.py.

Reads   data/manifest.csv, data/split.csv, data/images/<side>.npy, data/masks/, the checkpoint
Writes  data/probes/{everything,lungs,no_lungs,border,mask}.csv and .json: val, test, external
        data/probes/across/<region>.csv: trained at one site, tested at each

    python stages/probe_regions.py        (or: dvc repro probe_regions)
"""

from collections.abc import Callable

import numpy as np
from accelerate import Accelerator

from chest.core.files import replacing
from chest.core.params import Positive, Section, Text, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.data.regions import VISIBLE
from chest.evaluation.baselines import fit_linear, pool
from chest.evaluation.predictions import Record, tabulate, write
from chest.evaluation.probes import FOLDER, fit_across, probe_name, write_across
from chest.models.common.batch_inference import in_batches
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.view_masks import read_view_masks
from chest.models.common.views import View
from chest.models.encoders import Pooling, extract, load_encoder

Features = Callable[[ImageStore, np.ndarray], np.ndarray]  # of rows, float64 (n, K)


class ProbeSettings(Section):
    """The block ``probe_regions``; the regions take the place of ``view.visible``."""

    checkpoint: Text | None
    revision: Text
    image_size: Positive
    pooling: Pooling
    batch_size: Positive
    view: View


def main() -> None:
    params = load_params()
    settings = params.system("probe_regions", ProbeSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(None, params.system("precision", Precision))
    features_of, run = choose_features(accelerator, settings)

    every, answered = np.arange(len(data.table)), data.rows("val", "test", "external")
    with replacing(FOLDER) as folder:
        folder.mkdir()
        for region in VISIBLE:
            view = view_of(region, settings.view)
            masks, _ = read_view_masks(data.table, settings.image_size, view, params.seed)
            images = place_images(data.images, accelerator.device, masks, view)
            features = features_of(images, every)

            fitted = fit_linear(features, data.table)
            table = tabulate(data.table.iloc[answered], fitted.probabilities[answered])
            described = {"name": probe_name(region), "kind": "trained", **fitted.describe(run)}
            write(region, table, Record(n=len(answered), **described), folder)
            write_across(region, fit_across(features, data.table), folder)


def choose_features(accelerator: Accelerator, settings: ProbeSettings) -> tuple[Features, dict]:
    """Return what computes the features, and the fields of a record that describe an encoder."""
    size = settings.batch_size
    if settings.checkpoint is None:
        return lambda images, rows: pooled_pixels(images, rows, size), {}
    source = find_checkpoint(settings.checkpoint, settings.revision)
    encoder = load_encoder(accelerator, source, settings.image_size, settings.pooling)
    run = describe_run(accelerator, source, encoder.model, None)
    return lambda images, rows: extract(accelerator, encoder, images, rows, size), run


def pooled_pixels(images: ImageStore, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Return the visible pixels of `rows`, averaged over 28 x 28 cells: float64, (n, 784)."""
    shown = images.stream(in_batches(rows, batch_size))
    return np.concatenate([pool(batch.cpu().numpy()) for batch in shown])


def view_of(region: str, view: View) -> View:
    """Return `view` of a region: every image is answered, and the border is not cropped away."""
    crop = view.crop and region != "border"
    return view.model_copy(update={"visible": region, "crop": crop, "rejected": "whole"})


if __name__ == "__main__":
    run_stage(main)
