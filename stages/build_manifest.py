"""List every image of the study, and pack all of them into arrays.

Reads   data/index/ct_slices.csv, data/index/xrays.csv and the images that they list, data/slices
Writes  data/manifest.csv        one row per image, sorted by image_id
        data/images/<side>.npy   for each of image_sizes: uint8, (N, side, side), grey; row i is
                                 the manifest's row i
        data/images/lungs_<side>.npy    the published lung masks, packed bits, uint8 (M, side,
                                 ceil(side / 8)); row k is the k-th row of the manifest with a mask

    python stages/build_manifest.py        (or: dvc repro build_manifest)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import pandas as pd
from pydantic import Field

from chest.core.errors import InputError, Problem, refuse
from chest.core.files import read_table, replacing, write_table
from chest.core.parallel import parallel_map, progress
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import (
    IMAGES,
    INDEX_COLUMNS,
    ITEM_COLUMNS,
    MANIFEST,
    MANIFEST_COLUMNS,
    SLICE_COLUMNS,
    SLICE_INDEX,
    index_path,
)
from chest.data.masks import pack as pack_bits
from chest.data.masks import packed_shape, published_path, read_published_mask
from chest.data.pictures import read_pictures

Sides = Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(min_length=1)]


def main() -> None:
    sides = load_params().system("image_sizes", Sides)
    items = read_items()
    with replacing(IMAGES) as folder:
        folder.mkdir()
        manifest, problems = pack(items, sorted({*sides}), folder)
        problems += pack_masks(items["mask"], sorted({*sides}), folder)
        refuse(problems)
        refuse(contradictions(manifest))
        write_table(MANIFEST, manifest)


def read_items() -> pd.DataFrame:
    """Return the images of all collections, ITEM_COLUMNS, sorted by image_id."""
    slices, xrays = (index_path(name) for name in ("ct_slices", "xrays"))
    tables = [
        read_table(slices, INDEX_COLUMNS),
        read_table(xrays, INDEX_COLUMNS),
        read_table(SLICE_INDEX, SLICE_COLUMNS),
    ]
    items = pd.concat([table[[*ITEM_COLUMNS]] for table in tables])
    if items.empty:
        expected, remedy = "images in a collection", "see `collections` in params.yaml"
        raise InputError([Problem(slices.parent, "no image", expected, remedy)])
    return items.sort_values("image_id", ignore_index=True)


def pack(
    items: pd.DataFrame, sides: Sequence[int], folder: Path
) -> tuple[pd.DataFrame, list[Problem]]:
    """Decode each image once and write it to the array of each side.

    Returns the manifest of the good images, and a Problem for each of the others.
    """
    rows: list[dict] = []
    problems: list[Problem] = []
    pictures = progress(read_pictures(items["path"], sides), "images", len(items))
    shapes = {folder / f"{side}.npy": (len(items), side, side) for side in sides}
    with array_files(shapes) as files:
        for item, picture in zip(items.to_dict("records"), pictures, strict=True):
            if isinstance(picture, Problem):
                problems.append(picture)
                continue
            for side, file in zip(sides, files, strict=True):
                file.write(picture.pixels[side])
            size = {"width": picture.width, "height": picture.height}
            rows.append(item | size | {"pixel_hash": picture.pixel_hash})
    return pd.DataFrame(rows, columns=MANIFEST_COLUMNS), problems


def pack_masks(paths: pd.Series, sides: Sequence[int], folder: Path) -> list[Problem]:
    """Write the published lung masks to the array of each side; return what is wrong with them."""
    paths, problems = paths[paths != ""].tolist(), []
    masks = parallel_map(partial(read_published_mask, sides=sides), paths)
    shapes = {published_path(side, folder): packed_shape(len(paths), side) for side in sides}
    with array_files(shapes) as files:
        for mask in progress(masks, "masks", len(paths)):
            if isinstance(mask, Problem):
                problems.append(mask)
                continue
            for side, file in zip(sides, files, strict=True):
                file.write(pack_bits(mask[side]))
    return problems


@contextmanager
def array_files(shapes: dict[Path, tuple[int, ...]]) -> Iterator[list[BinaryIO]]:
    """Open a new .npy file of each shape, see `array_file`."""
    with ExitStack() as stack:
        yield [stack.enter_context(array_file(*item)) for item in shapes.items()]


@contextmanager
def array_file(path: Path, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """Open a new .npy file for a uint8 array of `shape`, whose values are to be written one by one.

    Written, not mapped: so the pages need not be in memory, and a full disk is an OSError instead
    of a signal that kills the process.
    """
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def contradictions(manifest: pd.DataFrame) -> list[Problem]:
    """Return a Problem for each picture that occurs under several labels."""
    labels = manifest.groupby("pixel_hash")["label"].transform("nunique")
    return [
        Problem(
            " and ".join(group["path"]),
            f"the same pixels as {' and as '.join(group['label'])}",
            "one label",
            "remove the wrong one with its row",
        )
        for _, group in manifest[labels > 1].groupby("pixel_hash")
    ]


if __name__ == "__main__":
    run_stage(main)
