"""Split the images into training, validation and test.

Reads   data/manifest.csv, of data/images.npy how many images there are
Writes  data/split.csv      image_id and split (train, val or test), sorted by image_id

All images of a patient, across the collections, and all images with identical pixels stay in one
split; each share holds in each class of each collection. The stage checks that itself before it
writes. With `split.group: image` it does what the published study did, and says what that leaks.

    python stages/split.py        (or: dvc repro split)
"""

import chest.early  # noqa: F401

import pandas as pd

from chest.dataset import SPLIT, read_images, read_manifest
from chest.errors import run_stage
from chest.files import write_table
from chest.params import load_params
from chest.splitting import assign_splits, check_split, share_table, shared_between_splits


def main() -> None:
    params = load_params()
    manifest = read_manifest()
    read_images(len(manifest))  # a manifest that lost its last rows looks whole
    shares = {"train": params.split.train, "val": params.split.val, "test": params.split.test}
    split = assign_splits(manifest, shares, params.split.group, params.seed)
    check_split(manifest, split, params.split.group)
    write_table(SPLIT, pd.DataFrame({"image_id": manifest["image_id"], "split": split}))

    print(share_table(manifest, split).round(3).to_string())
    shared = shared_between_splits(manifest, split, "patient_id")
    print(f"patients in more than one split: {len(shared)}")


if __name__ == "__main__":
    run_stage(main)
