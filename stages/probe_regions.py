"""Train a linear model on each region of the images alone: does the border tell the class?

The regions are the whole image, the lungs, all but the lungs, and the border; see
chest/evaluation/probes.py.

Reads   data/manifest.csv, data/split.csv, data/images/
Writes  data/probes/{everything,lungs,no_lungs,border}.csv and .json: val, test, external

    python stages/probe_regions.py        (or: dvc repro probe_regions)
"""

from chest.core.files import replacing
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation.predictions import Record, tabulate, write
from chest.evaluation.probes import FOLDER, fit_probes, probe_name


def main() -> None:
    data = read_dataset("train", "val", "test")
    fitted = fit_probes(data.images, data.table)

    rows = data.rows("val", "test", "external")
    with replacing(FOLDER) as folder:
        folder.mkdir()
        for region, probe in fitted.items():
            table = tabulate(data.table.iloc[rows], probe.probabilities[rows])
            described = {"name": probe_name(region), "kind": "trained", **probe.describe()}
            record = Record(n=len(rows), **described)
            write(region, table, record, folder)


if __name__ == "__main__":
    run_stage(main)
