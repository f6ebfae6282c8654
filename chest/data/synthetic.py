"""Synthetic images: made from training images, and added to training only, never to be answered."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table, replacing, write_table
from chest.data.dataset import Dataset, open_packed
from chest.data.pictures import resize_grey

SYNTHETIC = Path("data/synthetic")
SYNTHETIC_INDEX = SYNTHETIC / "manifest.csv"
SYNTHETIC_COLUMNS = ("synthetic_id", "label", "modality", "method", "seed", "guidance")
SYNTHETIC_AUDIT = Path("data/synthetic_audit.csv")
AUDIT_COLUMNS = (
    *("synthetic_id", "label", "modality", "method"),
    *("hash_nearest", "bits"),  # training image of the nearest perceptual hash
    *("nearest", "distance", "ratio", "percentile"),  # training image of the nearest features
    *("test_nearest", "test_distance", "near_copy", "dropped"),
)
SPLIT = "synthetic"  # of the rows that `add_synthetic` appends, and their site
TRAINED = ("train", SPLIT)


def resize_images(images: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 images (n, any side, the same) to (n, side, side), as real ones are resized."""
    if images.shape[-1] == side:
        return images
    resized = [resize_grey(Image.fromarray(image), side) for image in images]
    return np.array(resized, np.uint8).reshape(-1, side, side)


def write_synthetic(table: pd.DataFrame, images: np.ndarray, sides: set[int]) -> None:
    """Write data/synthetic/: `table` (SYNTHETIC_COLUMNS) and its `images`, for each of `sides`.

    `images` are uint8 (n, side, side); row i belongs to row i of `table`.
    """
    with replacing(SYNTHETIC) as folder:
        folder.mkdir()
        write_table(folder / SYNTHETIC_INDEX.name, table[list(SYNTHETIC_COLUMNS)])
        for side in sides:
            np.save(folder / f"{side}.npy", resize_images(images, side))


def read_synthetic(side: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the table of synthetic images, all strings, and the images, uint8 (n, side, side).

    Raises InputError if the files are missing, damaged, or not of this side.
    """
    table = read_table(SYNTHETIC_INDEX, SYNTHETIC_COLUMNS)
    return table, open_packed(SYNTHETIC / f"{side}.npy", (len(table), side, side))


def read_audit(table: pd.DataFrame) -> pd.DataFrame:
    """Return the audit (AUDIT_COLUMNS) of the synthetic images in `table`.

    Raises InputError if it is missing, or of other images.
    """
    audit = read_table(SYNTHETIC_AUDIT, AUDIT_COLUMNS)
    if list(audit["synthetic_id"]) != list(table["synthetic_id"]):
        expected = f"the {len(table)} images of {SYNTHETIC_INDEX}"
        raise InputError([Problem(SYNTHETIC_AUDIT, "other images", expected, REMEDY)])
    return audit.astype({"percentile": float}).assign(dropped=audit["dropped"] == "True")


def read_kept(table: pd.DataFrame) -> pd.Series:
    """Return which images of `table`, (n,), are no near-copies that `audit_synthetic` drops.

    Of methods other than diffusion nothing is dropped, and no audit is needed.
    """
    if not table["method"].eq("diffusion").any():
        return pd.Series(True, table.index)
    return ~read_audit(table)["dropped"]


def add_synthetic(data: Dataset, table: pd.DataFrame, images: np.ndarray) -> Dataset:
    """Return `data` with synthetic images behind its own, in the split SPLIT.

    What a training learns from are the images of TRAINED.
    """
    names = table["synthetic_id"]
    rows = table[["label", "modality"]].assign(image_id=names, patient_id=names, site=SPLIT)
    rows = rows.assign(split=SPLIT).reindex(columns=data.table.columns, fill_value="")
    whole = pd.concat([data.table, rows], ignore_index=True)
    return Dataset(whole, np.concatenate([data.images, images]))
