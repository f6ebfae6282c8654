"""Compare two systems, or two runs, on the same images: is the difference more than noise?

Prints UAR (balanced accuracy), WAR (accuracy), UAR within CT and within X-ray, and the recall of
each class of both; the difference with its 95 % interval (the same patients drawn for both) and the
half-width of this paired interval; and a verdict in words. No data are needed where
metrics/answers.csv has the answers.

FIRST and SECOND are each one of
    finetune_siglip               a system: data/predictions, else metrics/answers.csv
    elsewhere/predictions.csv     a predictions file, of the images of data/manifest.csv
    main:finetune_siglip          a system in metrics/answers.csv of a revision or DVC experiment

    python tools/compare.py zeroshot_siglip finetune_siglip
    python tools/compare.py HEAD:finetune_siglip finetune_siglip --split external
    python tools/compare.py main:finetune_siglip finetune_siglip --json
    python tools/compare.py blind_scanner a:finetune_siglip --runs b:finetune_siglip

With several runs of a system, trained with other seeds on the same split, their mean is compared,
and the interval holds the noise of training too.
"""

import argparse
import json
from dataclasses import asdict

import pandas as pd

from chest.core.errors import ChestError
from chest.core.labels import EVALUATED, LABEL_NAMES, SPLITS
from chest.core.runtime import parser, run_tool
from chest.evaluation.comparison import Comparison, Difference
from chest.evaluation.intervals import DRAWS
from chest.evaluation.revisions import read_all
from chest.reporting.review import SEED, compare_parts
from chest.reporting.wording import UAR_WITHIN, compared_cells, verdicts


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    sources = [options.first, *options.first_runs, options.second, *options.runs]
    splits = EVALUATED if options.split == "all" else (options.split,)
    tables = [table[table["split"].isin(splits)] for table in read_all(*sources)]
    for source, table in zip(sources, tables, strict=True):
        if table.empty:
            raise ChestError(f"{source} has no answers for {' or '.join(splits)}")
    count = 1 + len(options.first_runs)
    names = options.first, options.second
    result, within = compare_parts(
        tables[:count], tables[count:], options.seed, options.draws, names
    )
    write = as_json if options.json else as_text
    print(write(options, result, within, verdicts(result, within, names)))


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    add, several = command.add_argument, {"nargs": "+", "default": [], "metavar": "SOURCE"}
    add("first", metavar="FIRST")
    add("second", metavar="SECOND")
    add("--runs", **several, help="further runs of SECOND")
    add("--first-runs", **several, help="further runs of FIRST")
    add("--split", choices=[*SPLITS, "all"], default="test", help="all: test and external")
    add("--seed", type=int, default=SEED, help="of the draws (default: %(default)s)")
    add("--draws", type=int, default=DRAWS, metavar="N", help="default: %(default)s")
    add("--json", action="store_true", help="print json, for programs")
    options = command.parse_args(arguments)
    if options.seed < 0 or options.draws < 1:
        command.error("a seed from 0 and at least one draw expected")
    return options


def as_json(
    options: argparse.Namespace, result: Comparison, within: dict[str, Difference], said: list[str]
) -> str:
    figures = {"uar": result.uar, "war": result.war, **within}
    content = {
        **{key: getattr(options, key) for key in ("first", "second", "split", "seed", "draws")},
        **asdict(result),
        "within": {modality: asdict(difference) for modality, difference in within.items()},
        "half_width": {key: difference.half_width for key, difference in figures.items()},
        "beyond_noise": {key: difference.beyond_noise for key, difference in figures.items()},
        "note": result.note,
        "verdict": said,
    }
    return json.dumps(content, indent=2, allow_nan=False)


def as_text(
    options: argparse.Namespace, result: Comparison, within: dict[str, Difference], said: list[str]
) -> str:
    where = "Test and external" if options.split == "all" else f"The {options.split} split"
    figures = {
        **{UAR_WITHIN[modality]: difference for modality, difference in within.items()},
        **{"UAR": result.uar, "WAR": result.war},
        **{f"{LABEL_NAMES[label]} recall": own for label, own in result.recall.items()},
    }
    columns = ["first", "second", "difference", "95 % interval", "half-width"]
    table = pd.DataFrame(map(compared_cells, figures.values()), [*figures], columns)
    return f"""\
First:  {", ".join([options.first, *options.first_runs])}
Second: {", ".join([options.second, *options.runs])}
{where}: {result.images:,} images of {result.patients:,} patients

{table.to_string()}

UAR is the balanced accuracy, WAR the accuracy. Differences are second minus first, in percentage
points. Their paired 95 % intervals come from {options.draws:,} draws of the patients, the same ones
for both. The answers differ on {result.unlike:,} images; only the first is right on
{result.only_first:,}, only the second on {result.only_second:,}.

{chr(10).join(said)}"""


if __name__ == "__main__":
    run_tool(main)
