"""Cut one axial slice out of each CT volume.

Reads   data/index/ct_volumes.csv and the volumes that it lists
Writes  data/slices/<study>.png   8-bit grey, the volume's own resolution, in display orientation
        data/slices/index.csv     a row per slice: where it lies in its volume, and its values

    python stages/extract_slices.py        (or: dvc repro extract_slices)
"""

from functools import partial
from pathlib import Path

import pandas as pd
from PIL import Image

from chest.core.errors import Problem, refuse
from chest.core.files import read_table, replacing, write_table
from chest.core.parallel import parallel_map, progress
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import (
    INDEX_COLUMNS,
    ITEM_COLUMNS,
    SLICE_COLUMNS,
    SLICE_INDEX,
    SLICES,
    index_path,
)
from chest.data.pictures import fit
from chest.data.volumes import Slices, VolumeError, check_header, cut_axial_slice, to_grey

CHECKED_SIDE = 112  # px, to which a slice is resized only to see whether it shows anything


def main() -> None:
    slices = load_params().section("slices", Slices)
    volumes = read_table(index_path("ct_volumes"), INDEX_COLUMNS).to_dict("records")
    refuse(problem for volume in volumes if (problem := header_problem(volume["path"])))

    with replacing(SLICES) as folder:
        folder.mkdir()
        rows = parallel_map(partial(cut, folder=folder, slices=slices), volumes)
        rows = list(progress(rows, "slices", len(volumes)))
        refuse(row for row in rows if isinstance(row, Problem))
        write_table(folder / SLICE_INDEX.name, pd.DataFrame(rows, columns=SLICE_COLUMNS))


def header_problem(path: str) -> Problem | None:
    """Return why no slice can be cut from a volume, if its header tells."""
    try:
        check_header(path)
    except VolumeError as error:
        return error.problem
    return None


def cut(volume: dict[str, str], folder: Path, slices: Slices) -> dict | Problem:
    """Write the slice of a volume as ``<study>.png`` in `folder`; return its row of the index."""
    path = volume["path"]
    try:
        found = cut_axial_slice(path, slices.position, slices.verify)
    except VolumeError as error:
        return error.problem
    try:
        grey = to_grey(found.pixels, slices.normalize)
        picture = Image.fromarray(grey)
        fit(picture, [CHECKED_SIDE])
    except ValueError as error:
        remedy = "look at the volume; remove it, or set slices.position"
        return Problem(path, str(error), "a slice that shows a body", remedy)
    # Level 1 takes a third of the time of the default 6, and a sixth more space.
    picture.save(folder / f"{volume['study']}.png", compress_level=1)
    place = {"slice": found.index, "slices": found.count}
    size = {"rows": grey.shape[0], "columns": grey.shape[1]}
    values = {"lowest": f"{found.pixels.min():g}", "highest": f"{found.pixels.max():g}"}
    item = {column: volume[column] for column in ITEM_COLUMNS}
    paths = {"path": (SLICES / f"{volume['study']}.png").as_posix(), "volume": path}
    return item | paths | place | size | values


if __name__ == "__main__":
    run_stage(main)
