"""docs/results.md: the tables of the results on real lungs as Markdown, in their template."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chest.core.labels import DISEASES, LABEL_NAMES, MODALITY_NAMES
from chest.core.tables import markdown
from chest.evaluation import few_shots
from chest.evaluation.predictions import Record
from chest.reporting.model_card import NOTICE, TEMPLATES
from chest.reporting.results_tables import MAIN_VIEWS, in_order
from chest.reporting.wording import format_interval, format_points, percent

SHOWN_PATIENTS = ("1", "4", "16", "64", few_shots.ALL)
SHOWN_FILMS = (0, 20, 50)

Table = tuple[list[str], list[list[str]]]  # head and rows


def write_page(
    tables: Mapping[str, pd.DataFrame],
    charts: Mapping[str, str],
    found: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """Return docs/results.md; `facts` are those of `describe`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True
    )
    sections = in_sections(tables)
    helps = sections.pop("helps")
    trained = [*helps.groupby("trained", sort=False)] if len(helps) else []
    return environment.get_template("results.md").render(
        notice=NOTICE,
        tables={name: to_markdown(name, table) for name, table in sections.items()},
        helps={name: to_markdown("helps", own) for name, own in trained},
        charts=charts,
        findings=found,
        facts=facts,
    )


def in_sections(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return what the page shows of the tables; csv files hold the rest."""
    views, few, back = (tables[name] for name in ("views", "few_shots", "recalibration"))
    if len(views):
        main = views["view"].isin(MAIN_VIEWS)
        views, objections = views[main], views[~main]
    else:
        objections = views
    few = few[few["patients"].isin(SHOWN_PATIENTS)] if len(few) else few
    back = back[back["labelled"].isin(SHOWN_FILMS)] if len(back) else back
    return {**tables, "views": views, "objections": objections} | {
        "few_shots": few,
        "recalibration": back,
    }


def describe(records: Sequence[Record], commits: Sequence[str]) -> dict[str, str]:
    """Return what the runs have in common: checkpoints, devices, versions and commits."""
    named = {Path(x.checkpoint).name for x in records if x.checkpoint}
    versions = {f"{k} {v}" for x in records for k, v in x.versions.items()}
    devices = {f"{x.device}, {x.precision}" for x in records if x.device}
    sets = {
        "checkpoints": named,
        "devices": devices,
        "versions": versions,
        "commits": {*commits},
    }
    return {key: ", ".join(sorted(own)) or "none" for key, own in sets.items()}


def to_markdown(name: str, table: pd.DataFrame) -> str:
    """Return a table of the page, or that nothing was run."""
    if table.empty:
        return "Not run yet."
    make = {
        "systems": _systems_markdown,
        "views": _views_markdown,
        "objections": _objections_markdown,
        "helps": _helps_markdown,
        "starved": _starved_markdown,
        "recalibration": _recalibration_markdown,
        "synthetic": _synthetic_markdown,
        "synthetic_quality": _quality_markdown,
        "few_shots": _few_shots_markdown,
        "runs": _runs_markdown,
    }[name]
    return markdown(*make(table))


def cell(row: Mapping, name: str) -> str:
    """Return a figure with its interval; a dash if it is not there."""
    if name not in row or pd.isna(row[name]):
        return "-"
    return format_interval(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))


def changed(row: Mapping, name: str) -> str:
    """Return a difference in points with its interval; in bold if the interval excludes 0."""
    value, low, high = (row.get(f"{name}_change{end}") for end in ("", "_low", "_high"))
    if value is None or pd.isna(value):
        return "-"
    text = f"{format_points(value)} ({format_points(low)} to {format_points(high)})"
    return f"**{text}**" if low > 0 or high < 0 else text


FIGURES = {
    "AUROC": "auroc",
    "UAR": "uar",
    "recall of disease": "recall_disease",
    "recall of normal": "recall_normal",
    "sensitivity*": "sensitivity",
    "specificity*": "specificity",
}


def _systems_markdown(table: pd.DataFrame) -> Table:
    head = ["images", "system", "runs", "n (diseased)", *FIGURES, "ECE"]
    rows = [
        [
            row["place"],
            row["system"],
            str(row["runs"]),
            f"{row['images']:,} ({row['diseased']:,})",
            *(cell(row, name) for name in FIGURES.values()),
            percent(row["ece"]),
        ]
        for row in table.to_dict("records")
    ]
    return head, rows


def _views_markdown(table: pd.DataFrame) -> Table:
    shown = ("AUROC", "UAR", "sensitivity*", "specificity*")
    head = ["from and to", "method", "visible", "n", *shown, "change of AUROC", "of UAR", "ECE"]
    rows = [
        [
            *(row[key] for key in ("place", "method", "view")),
            f"{row['images']:,}",
            *(cell(row, FIGURES[name]) for name in shown),
            changed(row, "auroc"),
            changed(row, "uar"),
            percent(row["ece"]),
        ]
        for row in table.to_dict("records")
    ]
    return head, rows


def _objections_markdown(table: pd.DataFrame) -> Table:
    head = ["from and to", "method", "visible", "AUROC", "change of AUROC", "of UAR"]
    rows = [
        [
            *(row[key] for key in ("place", "method", "view")),
            cell(row, "auroc"),
            changed(row, "auroc"),
            changed(row, "uar"),
        ]
        for row in table.to_dict("records")
    ]
    return head, rows


def _helps_markdown(table: pd.DataFrame) -> Table:
    best = table.loc[table["trainings"] == table["trainings"].max(), "validated"].max()
    site = {"discriminator": "adversary's accuracy", "site_found": "site found"}
    site = {key: name for key, name in site.items() if table.get(key, pd.Series()).notna().any()}
    head = ["tested", "setting", "UAR on validation", "AUROC", "UAR"]
    rows = [
        [
            row["place"],
            row["setting"] + (" (chosen)" if row["validated"] == best else ""),
            _validated(row),
            cell(row, "auroc"),
            cell(row, "uar"),
            changed(row, "auroc"),
            changed(row, "uar"),
            *("-" if pd.isna(row[key]) else percent(row[key]) for key in site),
        ]
        for row in in_order(table, place=[*dict.fromkeys(table["place"])]).to_dict("records")
    ]
    return [*head, "change of AUROC", "of UAR", *site.values()], rows


def _validated(row: Mapping) -> str:
    if pd.isna(row["validated"]):
        return "-"
    return f"{percent(row['validated'])} ± {100 * row['validated_sd']:.1f}"


def _starved_markdown(table: pd.DataFrame) -> Table:
    head = [
        "tuberculosis in training",
        "share",
        "balance",
        "n tested",
        "recall",
        "of normal X-rays",
    ]
    rows = [
        [
            str(row["kept"]),
            percent(row["share"]),
            row["balance"],
            f"{row['tested']:,}",
            cell(row, "recall_tuberculosis"),
            cell(row, "recall_normal"),
        ]
        for row in table.sort_values(["kept", "balance"], ascending=[False, True]).to_dict(
            "records"
        )
    ]
    return head, rows


def _synthetic_markdown(table: pd.DataFrame) -> Table:
    shown = ("AUROC", "UAR", "recall of disease", "recall of normal")
    head = ["from and to", "films", "filled up by", "runs", *shown, "change of AUROC", "of UAR"]
    rows = [
        [
            *(str(row[key]) for key in ("place", "films", "filled", "runs")),
            *(cell(row, FIGURES[name]) for name in shown),
            changed(row, "auroc"),
            changed(row, "uar"),
        ]
        for row in table.sort_values(["place", "films"], kind="stable").to_dict("records")
    ]
    return head, rows


def _quality_markdown(table: pd.DataFrame) -> Table:
    shown = {"KID": "kid", "precision": "precision", "recall": "recall"}
    shown |= {"told from real": "probe_auroc"}
    head = ["films", "filled up by", "n", "near-copies", *shown]
    rows = [
        [
            *(str(row[key]) for key in ("films", "filled", "n")),
            str(row["near_copies"]),
            *(beside_real(row, key) for key in shown.values()),
        ]
        for row in table.to_dict("records")
    ]
    return head, rows


def beside_real(row: Mapping, name: str) -> str:
    """Return a figure of synthetic images beside that of real ones; a dash without either."""
    if pd.isna(row.get(name)):
        return "-"
    sd = f" ± {row[f'{name}_sd']:.2f}" if f"{name}_sd" in row else ""
    return f"{row[name]:.2f}{sd} (real {row[f'real_{name}']:.2f})"


def _recalibration_markdown(table: pd.DataFrame) -> Table:
    head = ["from and to", "method", "visible", "recalibrated", "labelled", "UAR", "AUROC", "Brier"]
    rows = [
        [
            *(str(row[key]) for key in ("place", "method", "view", "recalibrated", "labelled")),
            cell(row, "uar"),
            percent(row["auroc"]),
            f"{row['brier']:.3f}",
        ]
        for row in table.to_dict("records")
    ]
    return head, rows


def _few_shots_markdown(table: pd.DataFrame) -> Table:
    rows = [
        [
            f"{MODALITY_NAMES[row['modality']]} ({LABEL_NAMES[DISEASES[row['modality']]]})",
            few_shots.METHODS[row["method"]],
            row["patients"],
            f"{percent(row['uar'])} ± {100 * row['sd']:.1f}",
            str(row["n"]),
        ]
        for row in table.to_dict("records")
    ]
    return ["within", "method", "patients per class", "UAR", "draws and folds"], rows


def _runs_markdown(table: pd.DataFrame) -> Table:
    rows = [
        [row["part"], f"{row['done']} of {row['planned']}", f"{row['hours']:.2f}"]
        for row in table.to_dict("records")
    ]
    return ["part", "runs", "hours, all runs one after the other"], rows
