"""Measure how fast each part is, side by side with what people use today.

Ours and theirs take turns on the same machine in the same run. On a GPU the study's models run at
their full size, else smaller ones of the same architectures; their weights are random.

Writes  benchmarks/results/<machine>.json   every time that was taken, with commit and versions
        benchmarks/results/<machine>.md     the table of it

    python benchmarks/run.py                                     (or: make bench)
    python benchmarks/run.py --only systems training zeroshot    (or: make gpu)
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from files import measure_packing, measure_volumes
from measure import Row, circumstances, commit, device
from training import measure_systems, measure_training
from zeroshot import measure_zeroshot

from chest.core.errors import ChestError
from chest.core.files import write_json, write_text
from chest.core.runtime import parser, run
from chest.core.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
MODELS = {"training": measure_training, "zeroshot": measure_zeroshot}
FILES = {"volumes": measure_volumes, "packing": measure_packing}
STUDY = 13_040  # its training images
PARTS = (*FILES, *MODELS, "systems")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    models = "tiny" if options.tiny else "full" if torch.cuda.is_available() else "small"
    taken = options.commit or commit(ROOT)
    if taken.endswith("-dirty") and options.into == RESULTS:
        raise ChestError(
            "the working tree has changes: commit them, or write --into another folder"
        )
    rows: list[Row] = []
    systems: list[dict] = []
    for part in options.only or PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        if part == "systems":
            for system in measure_systems(models):
                systems.append(system)
                store(options, taken, rows, systems)
        else:
            measure, size = (FILES, "full") if part in FILES else (MODELS, models)
            rows += measure[part]("tiny" if options.tiny else size)
            store(options, taken, rows, systems)


def store(options, taken: str, rows: list[Row], systems: list[dict]) -> None:
    """Write what was measured so far, and print its table."""
    name = options.name or re.sub(r"\W+", "-", device()).strip("-").lower()
    content = {
        **circumstances(ROOT),
        "commit": taken,
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": 0,
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "systems": systems,
    }
    write_json(options.into / f"{name}.json", content)
    table = "\n\n".join([tabulate(rows)] * bool(rows) + [tabulate_systems(systems)] * bool(systems))
    write_text(options.into / f"{name}.md", f"{describe(content)}\n\n{table}\n")
    print(table, flush=True)


def read_options(arguments: Sequence[str] | None):
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    options.add_argument("--commit", help="that is measured, where Git does not say it")
    options.add_argument("--tiny", action="store_true", help="a few images: does it run at all?")
    options.add_argument("--name", help="of the results (default: the device's)")
    options.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    return options.parse_args(arguments)


def describe(content: dict) -> str:
    """The line above the table: where and with what it was measured."""
    return (
        f"{content['device']}, {content['memory_gib']} GiB; {content['threads']} threads; Python"
        f" {content['python']}, PyTorch {content['torch']}, transformers {content['transformers']};"
        f" commit {content['commit']}, {content['when']}. Medians, quartiles in brackets; weights"
        " and images are random."
    )


def tabulate(rows: list[Row]) -> str:
    """Each comparison as a line of a table."""
    head = ["what", "n", "ours", "theirs", "ratio", "theirs is"]
    lines = [
        [
            row.name + (f" ({row.note})" if row.note else ""),
            f"{row.n:,}",
            rate(row.ours, row.unit),
            rate(row.theirs, row.unit),
            f"{row.ratio:.2f}",
            row.opponent,
        ]
        for row in rows
    ]
    return markdown(head, lines)


def tabulate_systems(systems: list[dict]) -> str:
    """Each system's training as a line of a table."""
    head = ["trained for an epoch", "n", "rate", f"{STUDY:,} images, ten times", "memory", "runs"]
    head += ["largest difference of a weight"]
    lines = [
        [
            system["name"],
            f"{system['n']:,}",
            rate(system["seconds"], "images"),
            f"{10 * STUDY * np.median(system['seconds']) / 60:,.1f} min",
            system["memory"],
            str(len(system["seconds"])),
            f"{system['largest_difference_of_a_weight']:.1g}",
        ]
        for system in systems
    ]
    return markdown(head, lines)


def rate(times: list[float], unit: str) -> str:
    """Units a second: the median, with the quartiles where there are several times."""
    low, middle, high = (
        f"{x:,.3g}" if x < 1000 else f"{x:,.0f}"
        for x in np.percentile(1 / np.array(times), [25, 50, 75])
    )
    return f"{middle} {unit}/s" + (f" ({low} to {high})" if len(times) > 1 else "")


if __name__ == "__main__":
    run(main)
