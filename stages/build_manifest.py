"""List every image of the study, and pack all of them into one array.

Reads   data/raw/<profile>/large-covid19-ct-slice-dataset, data/raw/<profile>/chest-x-ray-lungs-
        segmentation, data/slices
Writes  data/manifest.csv   one row an image, sorted by image_id
        data/images.npy     uint8, (N, image_size, image_size), grey; row i is the manifest's row i

    python stages/build_manifest.py        (or: dvc repro build_manifest)
"""

import chest.early  # noqa: F401

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from chest.collections import (
    CT_SLICES,
    MOSMED_SITE,
    VOLUME_LABELS,
    XRAYS,
    Item,
    find_collections,
    mosmed_patient,
    read_ct_slices,
    read_xrays,
)
from chest.dataset import (
    IMAGES,
    MANIFEST,
    MANIFEST_COLUMNS,
    SLICE_COLUMNS,
    SLICE_INDEX,
    SLICES,
)
from chest.errors import InputError, Problem, refuse, run_stage
from chest.files import read_table, replacing, together, write_table
from chest.images import Grey, read_greys
from chest.labels import LABELS
from chest.params import ExpectedCounts, Params, load_params
from chest.progress import progress


@together()
def main() -> None:
    params = load_params()

    # 1. What the collections hold; everything that is wrong with their folders and tables at once.
    items = find_items(params)
    if params.chosen.expected_counts:
        check_counts(items, params.chosen.expected_counts)

    # 2. Decode each image once, on all cores, and append it to the array in the file.
    rows: list[dict] = []
    problems: list[Problem] = []
    shape = (len(items), params.image_size, params.image_size)
    check_room(math.prod(shape))
    with replacing(IMAGES) as partial:
        reading = read_greys([item.path for item in items], params.image_size)
        with array_file(partial, shape) as file, closing(reading) as greys:
            for item, grey in zip(items, progress(greys, "images", len(items)), strict=True):
                if isinstance(grey, Problem):
                    problems.append(grey)
                else:
                    file.write(grey.pixels)
                    rows.append(row_of(item, grey))
        refuse(problems)

        # 3. The manifest; the same picture under two labels is wrong in one of them.
        manifest = pd.DataFrame(rows, columns=MANIFEST_COLUMNS)
        refuse(contradictions(manifest))
        write_table(MANIFEST, manifest)


def find_items(params: Params) -> list[Item]:
    """Every image of the study, sorted by image_id; a volume is there as the slice cut from it."""
    raw = params.raw
    find_collections(raw, (CT_SLICES, XRAYS))
    problems: list[Problem] = []
    items = read_ct_slices(raw / CT_SLICES, problems)
    items += read_slices(problems)
    items += read_xrays(raw / XRAYS, params.labels.tuberculosis, problems)
    for image_id, count in Counter(item.image_id for item in items).items():
        if count > 1:
            problems.append(
                Problem(image_id, f"{count} images of that name", "one", "rename all but one")
            )
    refuse(problems)
    return sorted(items, key=lambda item: item.image_id)


def read_slices(problems: list[Problem]) -> list[Item]:
    """The slices that the index lists: those that lie beside it, no more and no fewer."""
    items = [
        Item(f"ct_volumes-{study}", SLICES / f"{study}.png", label, "ct", "ct_volumes",
             MOSMED_SITE, mosmed_patient(study), study)
        for study, label in read_table(SLICE_INDEX, SLICE_COLUMNS)[["study", "label"]].to_numpy()
    ]  # fmt: skip
    remedy = "run `dvc repro` again"
    labels = set(VOLUME_LABELS.values())
    for item in items:
        if not re.fullmatch(r"study_[0-9]{4}", item.study):
            problems.append(Problem(SLICE_INDEX, f"the study {item.study!r}", "study_NNNN", remedy))
        if item.label not in labels:
            found = f"{item.study}: the label {item.label!r}"
            problems.append(Problem(SLICE_INDEX, found, " or ".join(sorted(labels)), remedy))
    problems += [
        Problem(path, f"no row in {SLICE_INDEX.name}", "one row a slice", remedy)
        for path in {*SLICES.glob("*.png")} - {item.path for item in items}
    ]
    return items


def check_counts(items: list[Item], expected: ExpectedCounts) -> None:
    """Raise InputError, with both tables, where the classes are not as large as they should be."""
    found = Counter(item.label for item in items)
    if all(found[label] == getattr(expected, label) for label in LABELS):
        return
    lines = [f"{'':14}{'expected':>10}{'found':>10}"]
    lines += [f"{label:14}{getattr(expected, label):>10,}{found[label]:>10,}" for label in LABELS]
    raise InputError(
        [
            Problem(
                "class counts",
                ", ".join(f"{label} {found[label]}" for label in LABELS),
                ", ".join(f"{label} {getattr(expected, label)}" for label in LABELS),
                "complete the collections, or set expected_counts to null in params.yaml",
            )
        ],
        "\n".join(lines),
    )


def check_room(needed: int) -> None:
    """Raise InputError where the disk of the array has less than `needed` bytes free."""
    IMAGES.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(IMAGES.parent).free
    if free < needed:
        found, expected = (f"{count / 1e6:,.0f} MB" for count in (free, needed))
        refuse([Problem(IMAGES, f"{found} free on its disk", expected, "make room for it")])


@contextmanager
def array_file(path: Path, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A new .npy file of a uint8 array of `shape`, whose values are to be written one by one.

    Written, not mapped: so its pages need not be in memory, and a disk that is full is an OSError,
    which names the file, and not a signal that ends the process.
    """
    try:
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield file
    except OSError as error:
        error.filename = error.filename or str(IMAGES)
        raise


def row_of(item: Item, grey: Grey) -> dict:
    """The image's row of the manifest."""
    size = {"width": grey.width, "height": grey.height, "pixel_hash": grey.pixel_hash}
    return vars(item) | {"path": item.path.as_posix()} | size


def contradictions(manifest: pd.DataFrame) -> list[Problem]:
    """A Problem for each picture that occurs under more than one label."""
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
