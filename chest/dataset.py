"""The tables and the array that stages pass on: slices, manifest, packed images, split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chest.errors import InputError, Problem, refuse
from chest.files import read_table
from chest.labels import LABELS, MODALITIES, SPLITS

SLICES = Path("data/slices")
SLICE_INDEX = SLICES / "index.csv"
MANIFEST = Path("data/manifest.csv")
IMAGES = Path("data/images.npy")
SPLIT = Path("data/split.csv")

SLICE_COLUMNS = (
    "study", "volume", "label", "slice", "slices", "rows", "columns", "lowest", "highest",
)  # fmt: skip
MANIFEST_COLUMNS = (
    "image_id", "path", "label", "modality", "collection", "site", "patient_id", "study",
    "width", "height", "pixel_hash",
)  # fmt: skip
SPLIT_COLUMNS = ("image_id", "split")


@dataclass(frozen=True)
class Dataset:
    """All images of the study with what is known of each.

    ``table``: one row an image, the manifest's columns and ``split``, sorted by image_id.
    ``images``: uint8, (N, side, side), a memory map; row i belongs to row i of the table.
    """

    table: pd.DataFrame
    images: np.ndarray

    def rows(self, *splits: str) -> np.ndarray:
        """Row numbers, int64, of the images in any of `splits`, ascending."""
        return np.flatnonzero(self.table["split"].isin(splits))

    def targets(self) -> np.ndarray:
        """The class of each image as its number in LABELS, int64, (N,)."""
        return self.table["label"].map(LABELS.index).to_numpy(np.int64)


def read_manifest() -> pd.DataFrame:
    """``data/manifest.csv``: all columns strings, sorted by image_id.

    Raises InputError where an image is there twice or out of its order, or has no known label.
    """
    table = read_table(MANIFEST, MANIFEST_COLUMNS)
    remedy = "run `dvc repro` to make it again"
    images, problems = table["image_id"], []
    if not images.is_monotonic_increasing or not images.is_unique:
        found = "images doubled or not in order"
        problems.append(Problem(MANIFEST, found, "each image once, sorted by image_id", remedy))
    for column, known in (("label", LABELS), ("modality", MODALITIES)):
        for unknown in sorted(set(table[column]) - {*known}):
            problems.append(
                Problem(MANIFEST, f"the {column} {unknown!r}", " or ".join(known), remedy)
            )
    refuse(problems)
    return table


def read_labelled() -> pd.DataFrame:
    """The manifest with the column `split`; raises InputError where the two tables disagree."""
    manifest, split = read_manifest(), read_table(SPLIT, SPLIT_COLUMNS)
    remedy = "run `dvc repro` to make both again"
    if list(split["image_id"]) != list(manifest["image_id"]):
        raise InputError(
            [Problem(SPLIT, "other images", f"the {len(manifest)} images of {MANIFEST}", remedy)]
        )
    unknown = sorted(set(split["split"]) - set(SPLITS))
    if unknown:
        raise InputError([Problem(SPLIT, f"{unknown[0]!r}", " or ".join(SPLITS), remedy)])
    return manifest.assign(split=split["split"].to_numpy())


def read_dataset() -> Dataset:
    """Manifest, split and packed images; raises InputError where they do not fit together."""
    table = read_labelled()
    try:
        # Copy on write: torch takes arrays that could be written to; the file stays as it is.
        images = np.load(IMAGES, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            [Problem(IMAGES, str(error), "the packed images", "run `dvc repro` to make it again")]
        ) from None
    if images.dtype != np.uint8 or images.ndim != 3 or len(images) != len(table):
        found = f"{images.dtype} of shape {images.shape}"
        expected = f"uint8 of shape ({len(table)}, side, side)"
        raise InputError([Problem(IMAGES, found, expected, "run `dvc repro` to make it again")])
    return Dataset(table, images)
