"""The report on real lungs: tables, charts, docs/results.md and the ten lines in the README.

All figures come from the predictions that `tools/real.py` stored; what was not run is said to be
missing.
"""

import re
from pathlib import Path

import pandas as pd

from chest.core.files import write_table, write_text
from chest.core.labels import EVALUATED
from chest.evaluation.predictions import part_of
from chest.reporting.charts import draw_few_shots, draw_scores
from chest.reporting.findings import findings
from chest.reporting.real_charts import draw_forest, draw_lines
from chest.reporting.real_runs import RealRuns
from chest.reporting.results_page import describe, to_markdown, write_page
from chest.reporting.results_tables import (
    MAIN_VIEWS,
    METHODS,
    PROTOCOLS,
    Tables,
    in_order,
    tabulate,
)
from chest.reporting.scores import score_bins


def report(into: Path, docs: Path, readme: Path, command: str) -> None:
    """Write docs/results.md, docs/results/ and the lines between the marks in `readme`.

    `command` is what the page says the runs were made by.
    """
    runs = RealRuns(into)
    # Rounded as in the files, so that whoever computes from them finds what the pages say.
    tables = {name: table.round(4) for name, table in tabulate(runs).items()}
    folder = docs / "results"
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table, float_format="%.4f")
    charts = draw(folder, tables, runs)
    found = findings(tables)
    facts = describe([run.record for run in runs.runs], [run.commit for run in runs.runs])
    facts |= {"command": command}
    write_text(docs / "results.md", write_page(tables, charts, found, facts))
    fill(readme, "real", "\n".join(f"- {line}" for line in found))
    for name in ("synthetic", "synthetic_quality"):
        fill(docs / "synthetic.md", name, to_markdown(name, tables[name]))


def fill(page: Path, name: str, text: str) -> None:
    """Write `text` between the marks `name` of a page, if there is one."""
    if page.exists():
        old = page.read_text(encoding="utf-8")
        marks = rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
        new = re.sub(marks, lambda found: f"{found[1]}{text}\n{found[2]}", old, flags=re.DOTALL)
        write_text(page, new)


# --- Charts ----------------------------------------------------------------------------------


def draw(folder: Path, tables: Tables, runs: RealRuns) -> dict[str, str]:
    """Draw what there is; return {name: file} of the charts."""
    note = "In per cent. Bar: 95 % interval over patients and runs. Dashed: chance."
    makers = {
        "views": lambda path: _draw_views(path, tables["views"], note),
        "systems": lambda path: _draw_systems(path, tables["systems"], note),
        "scores": lambda path: _draw_scores(path, runs),
        "recalibration": lambda path: _draw_recalibration(path, tables["recalibration"]),
        "few_shots": lambda path: draw_few_shots(path, tables["few_shots"]),
        "starved": lambda path: _draw_starved(path, tables["starved"]),
        "synthetic": lambda path: _draw_synthetic(path, tables["synthetic"]),
    }
    charts = {}
    for name, make in makers.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if len(tables.get(name, "-")):
            make(path)
        if path.exists():
            charts[name] = f"results/{path.name}"
    return charts


def _draw_views(path: Path, views: pd.DataFrame, note: str) -> None:
    table = views[views["view"].isin(MAIN_VIEWS) & ~views["place"].str.contains("CT")]
    if table.empty:
        return
    order = [place for _, *two in PROTOCOLS.values() for place in two]
    order = [*order[0::2], *order[1::2]]
    table = in_order(table, place=order, view=MAIN_VIEWS, method=list(METHODS.values()))
    columns = {"place": "panel", "view": "row", "method": "series"}
    title = "AUROC of tuberculosis by what is visible,\nwithin a hospital and in one never seen"
    draw_forest(path, title, note, _interval_columns(table.rename(columns=columns), "auroc"))


def _draw_systems(path: Path, systems: pd.DataFrame, note: str) -> None:
    table = pd.concat(
        [_interval_columns(systems, name).assign(series=name.upper()) for name in ("auroc", "uar")]
    )
    table = table.rename(columns={"place": "panel", "system": "row"})
    draw_forest(path, "AUROC and UAR of each system, five folds pooled", note, table)


def _draw_scores(path: Path, runs: RealRuns) -> None:
    """Draw the scores of the fine-tuned network trained on the whole films of Shenzhen."""
    found = runs.find(protocol="shenzhen", system="finetuned", view="everything", variant="")
    if found:
        answers = pd.concat([run.answers for run in found])
        bins = [score_bins(split, part_of(answers, split)) for split in EVALUATED]
        name = f"EfficientNet fine-tuned on films of Shenzhen; external: {len(found)} x Montgomery"
        draw_scores(path, pd.concat(bins), {}, name)


def _draw_recalibration(path: Path, table: pd.DataFrame) -> None:
    table = table.assign(
        panel=table["place"],
        series=table["method"].str.split(",").str[0]
        + ": "
        + table["recalibrated"]
        + ", "
        + table["view"].str.lower(),
        x=table["labelled"],
    )
    title = "UAR in a hospital never seen, by labelled films from there"
    note = "Bar: 95 % of the draws of films and the training runs."
    labels = {"x": "Labelled films of the new hospital", "y": "UAR"}
    draw_lines(path, title, note, _interval_columns(table, "uar"), labels, (0, 5, 10, 20, 50))


def _draw_starved(path: Path, table: pd.DataFrame) -> None:
    names = {"recall_tuberculosis": "Recall of tuberculosis", "recall_normal": "Recall of normal"}
    parts = [
        _interval_columns(table, column).assign(
            panel=name, series=table["balance"], x=table["kept"]
        )
        for column, name in names.items()
    ]
    mean = pd.concat(parts).groupby(["panel", "series", "x"], sort=False)
    found = mean[["value", "low", "high"]].mean().reset_index()
    title = "Recall within X-ray by tuberculosis images in training"
    note = "Bar: 95 % interval over patients. Normal X-rays and all CT slices are left in training."
    ticks = sorted(table["kept"].unique())
    labels = {"x": "Tuberculosis images in training", "y": "Recall"}
    draw_lines(path, title, note, found, labels, ticks)


def _draw_synthetic(path: Path, table: pd.DataFrame) -> None:
    table = table.assign(panel=table["place"], series=table["filled"], x=table["films"])
    title = "AUROC by real tuberculosis films in training, and what fills them up"
    note = "Bar: 95 % interval over patients and training runs. Chance: 50 %."
    labels = {"x": "Real tuberculosis films in training", "y": "AUROC"}
    ticks = sorted(table["films"].unique())
    draw_lines(path, title, note, _interval_columns(table, "auroc"), labels, ticks)


def _interval_columns(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return `table` with the columns value, low and high of a figure."""
    ends = {"value": name, "low": f"{name}_low", "high": f"{name}_high"}
    return table.assign(**{key: table[column] for key, column in ends.items()})
