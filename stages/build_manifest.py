"""List every image of the study, and pack all of them into one array.

Reads   data/raw/<profile>/large-covid19-ct-slice-dataset, data/raw/<profile>/chest-x-ray-lungs-
        segmentation, data/slices
Writes  data/manifest.csv   one row an image, sorted by image_id
        data/images.npy     uint8, (N, image_size, image_size), grey; row i is the manifest's row i

    python stages/build_manifest.py        (or: dvc repro build_manifest)
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pandas as pd

from chest.collections import (
    CT_SLICES,
    MOSMED_SITE,
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
from chest.files import read_table, replacing, write_table
from chest.images import Grey, ImageError, read_grey
from chest.labels import LABELS
from chest.params import ExpectedCounts, Params, load_params
from chest.progress import progress, workers


def main() -> None:
    params = load_params()

    # 1. What the collections hold; everything that is wrong with their folders and tables at once.
    items = find_items(params)
    if params.chosen.expected_counts:
        check_counts(items, params.chosen.expected_counts)

    # 2. Decode each image once, and write it straight into its row of the array.
    problems: list[Problem] = []
    with replacing(IMAGES) as partial:
        side = params.image_size
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(items), side, side))
        with ThreadPoolExecutor(workers()) as pool:
            rows = list(
                progress(
                    pool.map(lambda i: pack(items[i], images[i], problems), range(len(items))),
                    "images", len(items),
                )
            )  # fmt: skip
        images.flush()
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
    items += [
        Item(f"ct_volumes-{study}", SLICES / f"{study}.png", label, "ct", "ct_volumes",
             MOSMED_SITE, mosmed_patient(study), study)
        for study, label in read_table(SLICE_INDEX, SLICE_COLUMNS)[["study", "label"]].to_numpy()
    ]  # fmt: skip
    items += read_xrays(raw / XRAYS, params.labels.tuberculosis, problems)
    for image_id, count in Counter(item.image_id for item in items).items():
        if count > 1:
            problems.append(
                Problem(image_id, f"{count} images of that name", "one", "rename all but one")
            )
    refuse(problems)
    return sorted(items, key=lambda item: item.image_id)


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


def pack(item: Item, row: np.ndarray, problems: list[Problem]) -> dict:
    """Write the image of `item` into `row`, (side, side); returns its row of the manifest."""
    try:
        grey: Grey = read_grey(item.path, row.shape[0])
    except ImageError as error:
        problems.append(error.problem)
        return {}
    row[:] = grey.pixels
    size = {"width": grey.width, "height": grey.height, "pixel_hash": grey.pixel_hash}
    return asdict(item) | {"path": item.path.as_posix()} | size


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
