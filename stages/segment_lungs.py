"""Find the lungs in every image: a mask for each, by a U-Net in X-rays, by thresholds in CT.

Reads   data/manifest.csv, data/images/, data/split.csv
Writes  data/masks/<side>.npy     for each packed side: masks as packed bits, uint8 (N, side,
                                  ceil(side / 8)); row i is the manifest's row i
        data/masks/index.csv      how each was made, its share of the image and parts, whether the
                                  gate accepts it, and its Dice with the published mask
        models/segment_lungs/     the U-Net and its training curve
        .resume/segment_lungs/    training states and finished masks, to resume an interrupted run

The U-Net learns the published masks of the training split's X-rays; so it has not seen a hospital
that `split.external` holds out. Without such masks X-rays get none. Masks are made at the largest
side and shrunk to the others.

    python stages/segment_lungs.py                 (or: dvc repro segment_lungs)
    accelerate launch stages/segment_lungs.py      on several GPUs
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator

from chest.core.files import replacing, write_table
from chest.core.parallel import parallel_map
from chest.core.params import Params, load_params
from chest.core.runtime import interrupt_note, run_stage
from chest.data.dataset import packed_sides, read_dataset
from chest.data.masks import (
    MASK_COLUMNS,
    MASK_INDEX,
    MASKS,
    dice,
    measure,
    pack,
    packed_shape,
    published_path,
    read_published_masks,
    resize_mask,
    segment_ct,
    unpack,
)
from chest.models.array_text import from_text, to_text
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.device import Precision, start
from chest.models.common.fingerprint import Fingerprint, fingerprint
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.journal import open_journal
from chest.models.lungs import LungSegmenter, make_segmenter, save_segmenter
from chest.training.checkpointing import States
from chest.training.loop import Task, train
from chest.training.segmentation import Segmentation, SegmentationSettings, Truth

STAGE = "segment_lungs"
MODEL = Path("models") / STAGE
SLICES = 256  # CT slices in a batch, which all cores share
RANDOM = Source("random weights", "", commit="none")


def main() -> None:
    params = load_params()
    settings = params.system(STAGE, SegmentationSettings)
    sides = packed_sides()
    data = read_dataset(side=max(sides, default=None))
    truth = Truth(*read_published_masks(data.table, sides[-1]))
    accelerator = start(params.seed, params.system("precision", Precision))
    images = place_images(data.images, accelerator.device)
    identity = identify(accelerator, params, settings, sides[-1])
    states = States(STAGE, identity)
    journal = open_journal(accelerator, f"{STAGE}/masks", identity)

    # 1. Learn the published masks of the training split.
    taught = {name: np.intersect1d(data.rows(name), truth.rows) for name in ("train", "val")}
    segmenter, curve = None, pd.DataFrame(columns=["epoch"])
    if all(map(len, taught.values())):
        segmenter = make_segmenter(accelerator, settings.unet)
        size = 2 * settings.batch_size  # no gradients are kept
        objective = Segmentation(segmenter, images, truth, taught["val"], size)
        task = Task(
            key=f"{params.profile}.{STAGE}",
            settings=settings,
            accelerator=accelerator,
            model=segmenter.model,
            images=images,
            rows=taught["train"],
            weights=None,
            objective=objective,
        )
        curve, _ = train(task, params.seed, states, lambda row: accelerator.print(describe(row)))

    # 2. Segment every image.
    with interrupt_note("The training and finished masks are saved: the next run resumes."):
        masks: dict[int, str] = {}
        xrays, slices = (np.flatnonzero(data.table["modality"] == x) for x in ("xray", "ct"))
        if segmenter:
            segmenter.model.eval()
            batches = in_batches(xrays, 2 * settings.batch_size)
            masks |= infer(accelerator, batches, by_unet(segmenter, images), journal)
        masks |= infer(accelerator, in_batches(slices, SLICES), by_thresholds(data.images), journal)

    # 3. Write the masks for every side, and how good they are.
    if accelerator.is_main_process:
        with replacing(MODEL) as folder:
            folder.mkdir()
            if segmenter:
                save_segmenter(segmenter, folder)
            write_table(folder / "training.csv", curve, float_format="%.6g")
        write_masks(data.table, masks, truth, sides)
        states.clear()
    accelerator.end_training()


def identify(
    accelerator: Accelerator, params: Params, settings: SegmentationSettings, side: int
) -> Fingerprint:
    """Return the digests of all that the masks depend on."""
    with open(published_path(side), "rb") as file:
        published = hashlib.file_digest(file, "sha256").hexdigest()
    chosen = settings.model_dump(exclude={"save_every"})
    parameters = {"seed": params.seed, "published": published, **chosen}
    return fingerprint(accelerator, RANDOM, side, parameters)


def describe(row: dict) -> str:
    """Return what is printed of an epoch."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def by_unet(segmenter: LungSegmenter, images: ImageStore) -> Callable[[np.ndarray], list[str]]:
    """Return a function that segments rows of X-rays."""
    return lambda rows: [to_text(pack(mask)) for mask in segmenter.segment(images.take(rows))]


def by_thresholds(images: np.ndarray) -> Callable[[np.ndarray], list[str]]:
    """Return a function that segments rows of CT slices on all cores."""
    return lambda rows: list(parallel_map(segment_slice, [images[row] for row in rows]))


def segment_slice(image: np.ndarray) -> str:
    """Return the lungs in a CT slice, as text."""
    return to_text(pack(segment_ct(image)))


def write_masks(table: pd.DataFrame, masks: dict[int, str], truth: Truth, sides: list[int]) -> None:
    """Write data/masks/: the masks of all images, made at the largest of `sides`, and the index."""
    published = dict(zip(truth.rows.tolist(), truth.packed, strict=True))
    packed = {side: np.zeros(packed_shape(len(table), side), np.uint8) for side in sides}
    rows = []
    for row, (image, modality) in enumerate(zip(table["image_id"], table["modality"], strict=True)):
        side = sides[-1]
        mask = np.zeros((side, side), bool)
        if row in masks:
            mask = unpack(from_text(masks[row], (side, -1)))
        for small, array in packed.items():
            array[row] = pack(mask if small == side else resize_mask(mask, small))
        method = {"xray": "unet", "ct": "threshold"}[modality] if row in masks else "none"
        figures = measure(mask)
        score = f"{dice(mask, unpack(published[row])):.4f}" if row in published else ""
        rows.append((image, method, f"{figures.area:.4f}", figures.parts, figures.accepted, score))
    with replacing(MASKS) as folder:
        folder.mkdir()
        for side, array in packed.items():
            np.save(folder / f"{side}.npy", array)
        write_table(folder / MASK_INDEX.name, pd.DataFrame(rows, columns=MASK_COLUMNS))


if __name__ == "__main__":
    run_stage(main)
