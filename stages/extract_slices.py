"""Cut one axial slice out of each CT volume of collection 2.

Reads   data/raw/<profile>/COVID19_1110/studies/CT-*/study_NNNN.nii.gz
Writes  data/slices/<study>.png   8-bit grey, the volume's own resolution, in display orientation
        data/slices/index.csv     for each study: volume, label, where the slice lies, grey range

    python stages/extract_slices.py        (or: dvc repro extract_slices)
"""

import chest.early  # noqa: F401

from contextlib import closing
from functools import partial
from pathlib import Path

import pandas as pd
from PIL import Image

from chest.collections import CT_VOLUMES, Item, find_collections, read_ct_volumes
from chest.dataset import SLICE_COLUMNS, SLICE_INDEX, SLICES
from chest.errors import Problem, refuse, run_stage
from chest.files import replacing, write_table
from chest.parallel import map_in_processes
from chest.params import Slices, load_params
from chest.progress import progress
from chest.volumes import VolumeError, check_header, cut_axial_slice, to_grey


def main() -> None:
    params = load_params()

    # 1. Find the volumes, and whatever is wrong with their folders and headers.
    find_collections(params.raw, (CT_VOLUMES,))
    problems: list[Problem] = []
    volumes = read_ct_volumes(params.raw / CT_VOLUMES, problems)
    for volume in volumes:
        try:
            check_header(volume.path)
        except VolumeError as error:
            problems.append(error.problem)
    refuse(problems)

    # 2. Cut a slice out of each; all of them, or none where one is damaged.
    with replacing(SLICES) as folder:
        folder.mkdir()
        cutting = partial(cut, folder=folder, slices=params.slices)
        with closing(map_in_processes(cutting, volumes)) as cuts:
            rows = list(progress(cuts, "slices", len(volumes)))
        refuse([row for row in rows if isinstance(row, Problem)])
        write_table(folder / SLICE_INDEX.name, pd.DataFrame(rows, columns=SLICE_COLUMNS))


def cut(volume: Item, folder: Path, slices: Slices) -> dict | Problem:
    """Write the volume's slice as `folder`/<study>.png; returns its row of the index."""
    try:
        cutting = cut_axial_slice(volume.path, slices.position, slices.verify)
        grey = to_grey(cutting.pixels, slices.normalize)
    except VolumeError as error:
        return error.problem
    except ValueError as error:
        return Problem(volume.path, str(error), "a slice that shows a body",
                       "look at the volume; remove it, or set slices.position")  # fmt: skip
    # Level 1 takes a third of the time of the usual 6, and a sixth more space.
    Image.fromarray(grey).save(folder / f"{volume.study}.png", compress_level=1)
    return {
        "study": volume.study,
        "volume": volume.path.as_posix(),
        "label": volume.label,
        "slice": cutting.index,
        "slices": cutting.count,
        "rows": grey.shape[0],
        "columns": grey.shape[1],
        "lowest": f"{cutting.pixels.min():g}",
        "highest": f"{cutting.pixels.max():g}",
    }


if __name__ == "__main__":
    run_stage(main)
