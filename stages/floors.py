"""Answer without a look at the images: the commonest training class of a site, or of a modality.

Reads   data/manifest.csv, data/split.csv
Writes  data/predictions/floor_site.csv, floor_modality.csv      one row an image of val and test
        data/predictions/floor_site.json, floor_modality.json    what the answer goes by, n

    python stages/floors.py        (or: dvc repro floors)
"""

import chest.early  # noqa: F401

from chest import predictions
from chest.dataset import read_labelled
from chest.errors import run_stage
from chest.files import together
from chest.floors import FLOORS, commonest_class
from chest.labels import SPLITS


@together()
def main() -> None:
    labelled = read_labelled(*SPLITS)
    asked = labelled["split"].isin(["val", "test"]).to_numpy()
    for system, by in FLOORS.items():
        shares = commonest_class(labelled, by)[asked]
        record = {"weights": "none", "by": by, "n": int(asked.sum())}
        predictions.write(system, predictions.tabulate(labelled[asked], shares), record)


if __name__ == "__main__":
    run_stage(main)
