"""The tables and the array that stages pass on: slices, manifest, packed images, split."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chest.errors import InputError, Problem, refuse
from chest.files import REMEDY, read_table, require_file
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

MAX_TEXT = 500  # characters of a value: a name, a patient's id; the longest published have 161
FORMULA = re.compile(r"[=+@]|-.")  # how a value begins that a spreadsheet may run


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

    Raises InputError where there is no image, one is there twice or out of its order, or has no
    known label, or a value is not as `is_plain` has it.
    """
    table = read_table(MANIFEST, MANIFEST_COLUMNS)
    images, problems = table["image_id"], []
    if table.empty:
        problems.append(Problem(MANIFEST, "no image", "a row for each image", REMEDY))
    if not images.is_monotonic_increasing or not images.is_unique:
        found = "images doubled or not in order"
        problems.append(Problem(MANIFEST, found, "each image once, sorted by image_id", REMEDY))
    for column, known in (("label", LABELS), ("modality", MODALITIES)):
        for unknown in sorted(set(table[column]) - {*known}):
            problems.append(
                Problem(MANIFEST, f"the {column} {unknown!r}", " or ".join(known), REMEDY)
            )
    for column in MANIFEST_COLUMNS:
        for value in sorted(v for v in set(table[column]) if not is_plain(v)):
            expected = f"one line of at most {MAX_TEXT} printable characters, no formula"
            problems.append(
                Problem(MANIFEST, f"the {column} {value[:40]!r}", expected, "repair its source")
            )
    refuse(problems)
    return table


def is_plain(value: str) -> bool:
    """Whether tables, terminals and spreadsheets can show it: short, one line, no formula."""
    return value.isprintable() and len(value) <= MAX_TEXT and not FORMULA.match(value)


def read_labelled(*needed: str) -> pd.DataFrame:
    """The manifest with the column `split`.

    Raises InputError where the two tables disagree, or one of the splits `needed` has no image.
    """
    manifest, split = read_manifest(), read_table(SPLIT, SPLIT_COLUMNS)
    remedy = "run `dvc repro` to make both again"
    if list(split["image_id"]) != list(manifest["image_id"]):
        raise InputError(
            [Problem(SPLIT, "other images", f"the {len(manifest)} images of {MANIFEST}", remedy)]
        )
    unknown = sorted(set(split["split"]) - set(SPLITS))
    if unknown:
        raise InputError([Problem(SPLIT, f"{unknown[0]!r}", " or ".join(SPLITS), remedy)])
    refuse([
        Problem(SPLIT, f"no image of {name}", f"images of {', '.join(needed)}", remedy)
        for name in needed
        if name not in set(split["split"])
    ])  # fmt: skip
    return manifest.assign(split=split["split"].to_numpy())


def read_dataset(*needed: str, side: int | None = None) -> Dataset:
    """Manifest, split and packed images; `needed` are splits that must have images.

    Raises InputError where the files do not fit together, or to images of `side` pixels.
    """
    table = read_labelled(*needed)
    return Dataset(table, read_images(len(table), side))


def read_images(count: int, side: int | None = None) -> np.ndarray:
    """``data/images.npy``: uint8, (count, side, side), a memory map; None: of whatever side.

    Raises InputError where it is anything else.
    """
    expected = f"uint8 of shape ({count}, {side or 'side'}, {side or 'side'})"
    try:
        require_file(IMAGES)
        # Copy on write: torch takes arrays that could be written to; the file stays as it is.
        images = np.lib.format.open_memmap(IMAGES, mode="c")
    except Exception as error:  # a damaged header raises a dozen kinds
        found = str(error) or type(error).__name__
        raise InputError([Problem(IMAGES, found, expected, REMEDY)]) from None
    size = (side or images.shape[-1]) if images.ndim == 3 else 0
    if not size or images.dtype != np.uint8 or images.shape != (count, size, size):
        found = f"{images.dtype} of shape {images.shape}"
        raise InputError([Problem(IMAGES, found, expected, REMEDY)])
    return images
