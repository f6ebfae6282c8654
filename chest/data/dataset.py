"""The tables and packed images that stages pass on: indexes, slices, manifest, split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.errors import InputError, Problem, refuse
from chest.core.files import REMEDY, read_table
from chest.core.labels import LABELS, MODALITIES, SPLITS

INDEX = Path("data/index")
SLICES = Path("data/slices")
SLICE_INDEX = SLICES / "index.csv"
MANIFEST = Path("data/manifest.csv")
IMAGES = Path("data/images")
SPLIT = Path("data/split.csv")

ITEM_COLUMNS = (
    *("image_id", "path", "label", "modality"),
    *("collection", "site", "patient_id", "study"),
    "mask",  # path of the published lung mask, or empty
)
INDEX_COLUMNS = (*ITEM_COLUMNS, "digest")
SLICE_COLUMNS = (
    *ITEM_COLUMNS,
    *("volume", "slice", "slices", "rows", "columns", "lowest", "highest"),
)
MANIFEST_COLUMNS = (*ITEM_COLUMNS, "width", "height", "pixel_hash")
SPLIT_COLUMNS = ("image_id", "split")


@dataclass(frozen=True)
class Dataset:
    """All images of the study with what is known of each.

    ``table``: one row per image, the manifest's columns and ``split``, sorted by image_id.
    ``images``: uint8, (N, side, side), a memory map; row i belongs to row i of the table.
    """

    table: pd.DataFrame
    images: np.ndarray

    def rows(self, *splits: str) -> np.ndarray:
        """Return the row numbers, int64 and ascending, of the images in any of `splits`."""
        return np.flatnonzero(self.table["split"].isin(splits))

    def targets(self) -> np.ndarray:
        """Return the class of each image as its position in LABELS, int64, (N,)."""
        return self.table["label"].map(LABELS.index).to_numpy(np.int64)

    def modalities(self) -> np.ndarray:
        """Return the modality of each image as its position in MODALITIES, int64, (N,)."""
        return self.table["modality"].map(MODALITIES.index).to_numpy(np.int64)


def index_path(collection: str) -> Path:
    """Return where the index of `collection` is, for instance ``data/index/xrays.csv``."""
    return INDEX / f"{collection}.csv"


def read_manifest() -> pd.DataFrame:
    """Read ``data/manifest.csv``: all columns strings, sorted by image_id.

    Raises InputError if it has no image, images doubled or out of order, or unknown labels.
    """
    table = read_table(MANIFEST, MANIFEST_COLUMNS)
    images, problems = table["image_id"], []
    if table.empty:
        problems.append(Problem(MANIFEST, "no image", "a row for each image", REMEDY))
    if not images.is_monotonic_increasing or not images.is_unique:
        found = "images doubled or out of order"
        problems.append(Problem(MANIFEST, found, "each image once, sorted by image_id", REMEDY))
    for column, known in (("label", LABELS), ("modality", MODALITIES)):
        for unknown in sorted(set(table[column]) - {*known}):
            found = f"the {column} {unknown!r}"
            problems.append(Problem(MANIFEST, found, " or ".join(known), REMEDY))
    refuse(problems)
    return table


def read_labelled(*needed: str) -> pd.DataFrame:
    """Read the manifest with the column ``split``.

    Raises InputError if the two tables disagree, or one of the splits `needed` has no image.
    """
    manifest, split = read_manifest(), read_table(SPLIT, SPLIT_COLUMNS)
    problems = []
    if list(split["image_id"]) != list(manifest["image_id"]):
        expected = f"the {len(manifest)} images of {MANIFEST}"
        problems.append(Problem(SPLIT, "other images", expected, REMEDY))
    for unknown in sorted(set(split["split"]) - set(SPLITS)):
        problems.append(Problem(SPLIT, f"the split {unknown!r}", " or ".join(SPLITS), REMEDY))
    for name in sorted({*needed} - set(split["split"])):
        expected = f"images in {', '.join(needed)}"
        problems.append(Problem(SPLIT, f"no image in {name}", expected, REMEDY))
    refuse(problems)
    return manifest.assign(split=split["split"].to_numpy())


def read_dataset(*needed: str, side: int | None = None) -> Dataset:
    """Read manifest, split, and the images packed to `side` pixels (default: the smallest).

    Raises InputError if the files do not belong together, one of the splits `needed` has no image,
    or the images were not packed to this side.
    """
    table = read_labelled(*needed)
    return Dataset(table, read_images(len(table), side))


def read_images(count: int, side: int | None = None) -> np.ndarray:
    """Open ``data/images/<side>.npy``: uint8, (count, side, side), a memory map.

    Without `side`, the smallest one that was packed. Raises InputError if the file is missing or
    holds anything else.
    """
    sides = packed_sides()
    if side is None and sides:
        side = sides[0]
    path = IMAGES / f"{side or 'side'}.npy"
    expected = f"uint8 of shape ({count}, {side or 'side'}, {side or 'side'})"
    if side not in sides:
        found = f"images packed to {', '.join(map(str, sides)) or 'no side'}"
        remedy = f"name the side in image_sizes of params.yaml, and {REMEDY}"
        raise InputError([Problem(path, found, expected, remedy)])
    return open_packed(path, (count, side, side))


def packed_sides() -> list[int]:
    """Return the sides in px to which images were packed, ascending."""
    return sorted(int(path.stem) for path in IMAGES.glob("*.npy") if path.stem.isdecimal())


def open_packed(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Open a .npy file of uint8 values as a memory map; raises InputError if it holds others."""
    expected = f"uint8 of shape {shape}"
    try:
        # Copy on write: torch wants arrays that could be written to; the file stays as it is.
        values = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError) as error:
        raise InputError([Problem(path, str(error), expected, REMEDY)]) from None
    if values.dtype != np.uint8 or values.shape != shape:
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError([Problem(path, found, expected, REMEDY)])
    return values
