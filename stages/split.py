"""Split the images into training, validation, test and, for a held-out site, external images.

Reads   data/manifest.csv
Writes  data/split.csv      image_id and split (train, val, test, external), sorted by image_id

All images of a patient, across the collections, and all images with identical pixels stay in one
split; the shares hold in each class of each collection. The stage verifies both. The parameters
`split.external` holds sites out, `split.folds` makes folds for cross-validation, and `split.group:
image` repeats the published study's protocol, with its leak.

    python stages/split.py        (or: dvc repro split)
"""

import pandas as pd

from chest.core.files import write_table
from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import SPLIT, read_manifest
from chest.data.splits import (
    Split,
    assign_splits,
    check_split,
    share_table,
    shared_between_splits,
)


def main() -> None:
    params = load_params()
    settings = params.section("split", Split)
    manifest = read_manifest()
    seed = params.seed if settings.seed is None else settings.seed
    split = assign_splits(manifest, settings, seed)
    check_split(manifest, split, settings.group)
    write_table(SPLIT, pd.DataFrame({"image_id": manifest["image_id"], "split": split}))

    print(share_table(manifest, split).round(3).to_string())
    shared = shared_between_splits(manifest, split, "patient_id")
    print(f"patients in more than one split: {len(shared)}")


if __name__ == "__main__":
    run_stage(main)
