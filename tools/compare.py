"""Compare two systems, or two runs, on the same images: is the difference more than noise?

Reads   the predictions of both, and the manifest and split that they belong to
Prints  UAR, WAR and the recall of each class of both, the difference with its 95 % interval (the
        same patients drawn for both), McNemar's exact test, and a verdict in words

FIRST and SECOND are each one of
    finetune_siglip               a system: data/predictions/finetune_siglip.csv
    elsewhere/predictions.csv     a predictions file, of the images of data/manifest.csv
    main:finetune_siglip          a system as of a Git revision or a DVC experiment, with that
                                  revision's manifest and split, out of DVC's cache or remote

    python tools/compare.py zeroshot_siglip finetune_siglip
    python tools/compare.py main:finetune_siglip finetune_siglip --split val
    python tools/compare.py HEAD~1:finetune_siglip lively-newt:finetune_siglip --json
"""

import argparse
import json
from dataclasses import asdict

import pandas as pd

from chest.commands import parser
from chest.comparison import Comparison, compare, points, verdicts
from chest.errors import run
from chest.intervals import DRAWS, FEWEST_DRAWS
from chest.labels import LABEL_NAMES, SPLITS
from chest.revisions import read_all


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    names = options.first, options.second
    first, second = read_all(*names)
    split = None if options.split == "all" else options.split
    result = compare(first, second, options.seed, split, options.draws, names)
    if options.json:
        print(json.dumps(as_json(result, options), indent=2, allow_nan=False))
    else:
        print(as_text(result, options))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("first", metavar="FIRST")
    command.add_argument("second", metavar="SECOND")
    command.add_argument(
        "--split", choices=[*SPLITS, "all"], default="test",
        help="the images to compare on; all: every image that they answered (default: test)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")
    command.add_argument(
        "--draws", type=int, default=DRAWS, metavar="N",
        help=f"of patients, {FEWEST_DRAWS:,} or more (default: {DRAWS:,})",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print json, for programs")
    return command.parse_args(arguments)


# --- Printing --------------------------------------------------------------------------------


def as_json(result: Comparison, options: argparse.Namespace) -> dict:
    names = options.first, options.second
    return {
        "first": names[0],
        "second": names[1],
        "split": options.split,
        "seed": options.seed,
        "draws": options.draws,
        **asdict(result),
        "beyond_noise": {"uar": result.uar.beyond_noise, "war": result.war.beyond_noise},
        "verdict": verdicts(result, names),
    }


def as_text(result: Comparison, options: argparse.Namespace) -> str:
    names = options.first, options.second
    n = result.images["total"]
    where = "All images" if options.split == "all" else f"The {options.split} split"
    return "\n".join(
        [
            f"First:  {names[0]}",
            f"Second: {names[1]}",
            f"{where}: {n:,} images of {result.patients['total']:,} patients",
            "",
            tabulate(result),
            "",
            "Differences are second minus first, in percentage points; their intervals come from"
            f" {options.draws:,} draws of the patients, the same ones for both.",
            f"The answers differ on {result.unlike:,} of {n:,} images. Only the first is right on"
            f" {result.only_first:,}, only the second on {result.only_second:,}: McNemar's exact"
            f" test p = {result.mcnemar_p:.2g}, as if each image were of another patient.",
            "",
            *verdicts(result, names),
        ]
    )


def tabulate(result: Comparison) -> str:
    rows = {"UAR": (result.uar, "total"), "WAR": (result.war, "total")}
    for label, difference in result.recall.items():
        rows[f"{LABEL_NAMES[label]} recall"] = (difference, label)
    table = pd.DataFrame(
        {
            "first": f"{100 * d.first:.1f} %",
            "second": f"{100 * d.second:.1f} %",
            "difference": points(d.change.value),
            "95 % interval": f"{points(d.change.low)} to {points(d.change.high)}",
            "images": f"{result.images[key]:,}",
            "patients": f"{result.patients[key]:,}",
        }
        for d, key in rows.values()
    )
    table.index = list(rows)
    return table.to_string()


if __name__ == "__main__":
    run(main)
