"""List every image and volume of the collections, and check that all of them are there.

Reads   data/raw/<profile>/
Writes  data/index/<collection>.csv   one row per image or volume: label, site, patient, and the
                                      digest of the file and its lung mask; only a header if
                                      `collections` leaves the collection out

Everything that is wrong with folders and tables is told at once, before long work starts. An X-ray
that is added changes the index of the X-rays alone, so no CT volume is cut again.

    python stages/index_collections.py        (or: dvc repro index_collections)
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field

from chest.core.errors import Problem, refuse
from chest.core.files import write_table
from chest.core.labels import COLLECTIONS, LABELS
from chest.core.parallel import parallel_map, progress
from chest.core.params import Count, Params, Section, load_params
from chest.core.runtime import run_stage
from chest.data.collections import (
    FOLDERS,
    Item,
    read_ct_slices,
    read_ct_volumes,
    read_xrays,
)
from chest.data.dataset import INDEX_COLUMNS, index_path

CHUNK = 1024 * 1024  # bytes that are read at a time
Collections = Annotated[list[Literal[COLLECTIONS]], Field(min_length=1)]


class Labels(Section):
    tuberculosis: Literal["ptb", "remarks"]


class ExpectedCounts(Section):
    covid19: Count
    normal: Count
    tuberculosis: Count


def main() -> None:
    params = load_params()
    used = params.section("collections", Collections)
    expected = params.system("expected_counts", ExpectedCounts | None)

    # 1. Read the folders and tables; refuse everything that is wrong at once.
    problems: list[Problem] = []
    items = [item for name in used for item in read_collection(name, params, problems)]
    problems += doubled_ids(items) + unexpected_counts(items, expected, params.profile)
    refuse(problems)

    # 2. The digests tell DVC which of the next stages a changed file concerns.
    digests = parallel_map(digest, [(item.path, item.mask) for item in items])
    digests = list(progress(digests, "files", len(items)))
    refuse(found for found in digests if isinstance(found, Problem))

    rows = [
        vars(item) | {"path": item.path.as_posix(), "mask": mask_path(item), "digest": found}
        for item, found in zip(items, digests, strict=True)
    ]
    table = pd.DataFrame(rows, columns=INDEX_COLUMNS).sort_values("image_id")
    for name in COLLECTIONS:
        write_table(index_path(name), table[table["collection"] == name])
        print(f"{name}: {(table['collection'] == name).sum()}")


def read_collection(name: str, params: Params, problems: list[Problem]) -> list[Item]:
    """Return the images or volumes of a collection; append to `problems` what is wrong with it."""
    folder = params.raw / FOLDERS[name]
    before = len(problems)
    if not folder.is_dir():
        items, found = [], "no such folder"
    elif name == "ct_slices":
        items, found = read_ct_slices(folder, problems), "no image"
    elif name == "ct_volumes":
        items, found = read_ct_volumes(folder, problems), "no volume"
    else:
        labels = params.section("labels", Labels)
        items, found = read_xrays(folder, labels.tuberculosis, problems), "no image"
    if not items and len(problems) == before:
        expected = f"the collection {name}, unpacked"
        remedy = "put it there (see data/raw/README.md), or leave it out of `collections`"
        problems.append(Problem(folder, found, expected, f"{remedy} in params.yaml"))
    return items


def doubled_ids(items: list[Item]) -> list[Problem]:
    """Return a Problem for each image_id that several files would share."""
    counts = Counter(item.image_id for item in items)
    return [
        Problem(item.path, f"{item.image_id} a second time", "one image per id", "rename it")
        for item in items
        if counts[item.image_id] > 1
    ]


def unexpected_counts(
    items: list[Item], expected: ExpectedCounts | None, profile: str
) -> list[Problem]:
    """Return a Problem if the classes are not as large as `expected`."""
    found = Counter(item.label for item in items)
    wanted = expected.model_dump() if expected else found
    if all(found[label] == wanted[label] for label in LABELS):
        return []
    show = ", ".join
    return [
        Problem(
            "the collections together",
            show(f"{found[label]:,} {label}" for label in LABELS),
            show(f"{wanted[label]:,} {label}" for label in LABELS),
            f"complete them, or set {profile}.expected_counts in params.yaml to what they hold, "
            "or to null",
        )
    ]


def mask_path(item: Item) -> str:
    """Return the path of the item's published lung mask, or an empty string."""
    return item.mask.as_posix() if item.mask else ""


def digest(paths: tuple[Path, Path | None]) -> str | Problem:
    """Return the first half of the SHA-256 of a file and its mask, one after the other."""
    total = hashlib.sha256()
    for path in filter(None, paths):
        try:
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    total.update(chunk)
        except OSError as error:
            return Problem(path, f"no readable file ({error.strerror})", "a file", "fetch it again")
    return total.hexdigest()[:32]


if __name__ == "__main__":
    run_stage(main)
