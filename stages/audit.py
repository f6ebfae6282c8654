"""Look for what the splits share: near-duplicates across them, found by perceptual hash.

Reads   data/manifest.csv, data/split.csv, data/images/<side>.npy, of the smallest side
Writes  data/audit/near_duplicates.csv   the pairs of near-duplicates in two splits, closest first;
                                         the 200,000 closest if there are more
        data/audit/by_distance.csv       how many pairs, of one patient and of two, by distance
        data/audit/counts.json           how many pairs, by splits, label and patient

A near-duplicate is no error: the stage lists them, and `evaluate` counts them for the reviewer.

    python stages/audit.py        (or: dvc repro audit)
"""

from chest.core.files import replacing, write_json, write_table
from chest.core.runtime import run_stage
from chest.data.audit import (
    AUDIT,
    BY_DISTANCE,
    COUNTS,
    NEAR_DUPLICATES,
    find_near_duplicates,
    perceptual_hashes,
)
from chest.data.dataset import read_dataset


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
    print(f"near-duplicates across splits: {pairs:,}, of different patients: {others:,}")
    if pairs > len(found.pairs):
        print(f"{NEAR_DUPLICATES} lists the {len(found.pairs):,} closest")


if __name__ == "__main__":
    run_stage(main)
