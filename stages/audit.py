"""Look for what the splits share: near-duplicates across them, found by perceptual hash.

Reads   data/manifest.csv, data/images.npy, data/split.csv
Writes  data/audit/near_duplicates.csv   every pair of near-duplicates in two splits, closest first
        data/audit/by_distance.csv       how many pairs, of one patient and of two, by distance

A near-duplicate is no error: the stage lists them, and `evaluate` counts them for the reviewer.
About 10 s for the study's 16,300 images on two CPU cores.

    python stages/audit.py        (or: dvc repro audit)
"""

from chest.audit import (
    AUDIT,
    NEAR_DUPLICATES,
    count_by_distance,
    find_near_duplicates,
    perceptual_hashes,
)
from chest.dataset import read_dataset
from chest.errors import run_stage
from chest.files import replacing, write_table


def main() -> None:
    data = read_dataset()
    near_duplicates = find_near_duplicates(data.table, perceptual_hashes(data.images))
    counts = count_by_distance(near_duplicates)
    with replacing(AUDIT) as folder:
        folder.mkdir()
        write_table(folder / NEAR_DUPLICATES.name, near_duplicates)
        write_table(folder / "by_distance.csv", counts)

    if len(counts):
        print(counts.to_string(index=False))
    others = counts["other_patient"].sum()
    print(f"near-duplicates across splits: {len(near_duplicates)}, of different patients: {others}")


if __name__ == "__main__":
    run_stage(main)
