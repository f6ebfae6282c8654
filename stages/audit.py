"""Look for what the splits share: near-duplicates across them, found by perceptual hash.

Reads   data/manifest.csv, data/images.npy, data/split.csv
Writes  data/audit/near_duplicates.csv   the pairs of near-duplicates in two splits, closest first:
                                         all of them, or the 200,000 closest where there are more
        data/audit/by_distance.csv       how many pairs, of one patient and of two, by distance
        data/audit/counts.json           how many pairs, by splits and label, and of test images

A near-duplicate is no error: the stage lists them, and `evaluate` counts them for the reviewer.
About 10 s for the study's 16,300 images on two CPU cores.

    python stages/audit.py        (or: dvc repro audit)
"""

import chest.early  # noqa: F401

from chest.audit import (
    AUDIT,
    BY_DISTANCE,
    COUNTS,
    NEAR_DUPLICATES,
    find_near_duplicates,
    perceptual_hashes,
)
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.files import replacing, write_json, write_table


def main() -> None:
    data = read_dataset()
    found = find_near_duplicates(data.table, perceptual_hashes(data.images))
    with replacing(AUDIT) as folder:
        folder.mkdir()
        write_table(folder / NEAR_DUPLICATES.name, found.pairs)
        write_table(folder / BY_DISTANCE.name, found.by_distance)
        write_json(folder / COUNTS.name, found.counts)

    if len(found.by_distance):
        print(found.by_distance.to_string(index=False))
    others = found.by_distance["other_patient"].sum()
    pairs = found.counts["pairs"]
    print(f"near-duplicates across splits: {pairs}, of different patients: {others}")
    if pairs > len(found.pairs):
        print(f"{NEAR_DUPLICATES} lists the {len(found.pairs):,} closest")


if __name__ == "__main__":
    run_stage(main)
