"""The model card and the checklist, filled from a run so that neither can go stale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chest.core.labels import (
    COLLECTION_NAMES,
    LABEL_NAMES,
    LABELS,
    MODALITIES,
    MODALITY_NAMES,
    SPLITS,
)
from chest.core.params import Params
from chest.core.tables import markdown
from chest.data.regions import VISIBLE_NAMES
from chest.evaluation.comparison import ONE_RUN, points
from chest.evaluation.predictions import Record, System
from chest.evaluation.subgroups import worst_group
from chest.reporting.scores import ALL, Found

TEMPLATES = Path(__file__).parent / "templates"
NOTICE = (
    "**This is research on public data. It is no diagnosis, no medical device, and must not be used"
    "\non patients.**"
)
PHANTOM = (
    "\n\n> **Phantom run.** The images are drawn and the checkpoints began with random weights: no"
    "\n> figure below says anything about real lungs."
)
WITHIN = {ALL: "all images"} | {kind: f"within {name}" for kind, name in MODALITY_NAMES.items()}
SUFFIXES = ("", "_low", "_high")
TARGETS = {"sensitivity_90": "sensitivity 90 %", "specificity_70": "specificity 70 %"}


@dataclass(frozen=True)
class Run:
    """What `evaluate` found out about a run.

    ``labelled``: the manifest with the column split; ``found``: figures of the systems; ``uars``,
    ``recalls``, ``probe_uars``: the tables uar, recall and probes of plots/; ``leaks``:
    metrics/audit.json; ``comparisons``: see `primary_comparisons`.
    """

    params: Params
    labelled: pd.DataFrame
    systems: dict[str, System]
    primary: System
    found: Found
    uars: pd.DataFrame
    recalls: pd.DataFrame
    probe_uars: pd.DataFrame
    leaks: dict
    comparisons: pd.DataFrame

    @property
    def names(self) -> dict[str, str]:
        return {key: system.name for key, system in self.systems.items()}

    @property
    def blind(self) -> list[str]:
        return [key for key, system in self.systems.items() if system.record.kind == "blind"]

    @property
    def triage(self) -> dict[str, float]:
        """{modality: threshold of the primary system for a sensitivity of 90 % on validation}."""
        points = self.found[self.primary.key]["test"].points
        chosen = points[points["target"] == "sensitivity_90"]
        return dict(zip(chosen["modality"], chosen["threshold"], strict=True))


def render(template: str, run: Run) -> str:
    """Fill templates/`template`, ``model_card.md`` or ``claim.md``."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(_values(run))


def _values(run: Run) -> dict:
    """Return everything the templates ask for."""
    record, content, labelled = run.primary.record, run.params.content, run.labelled
    profile, by_split = content[run.params.profile], labelled.groupby("split")
    groups = run.found[run.primary.key]["test"].groups
    sites = [group for group in groups if group.kind == "site_collection"]
    uars = run.uars[(run.uars["split"] == "test") & (run.uars["within"] == ALL)]
    probes = run.probe_uars[(run.probe_uars["split"] == "test") & (run.probe_uars["within"] == ALL)]
    return {
        "notice": NOTICE + (PHANTOM if run.params.profile == "phantom" else ""),
        "primary": run.primary,
        "record": record,
        "content": content,
        "seed": run.params.seed,
        "leaks": run.leaks,
        "one_run": ONE_RUN,
        "label_names": LABEL_NAMES,
        "modality_names": MODALITY_NAMES,
        "checkpoint": _checkpoint(record),
        "device": "CPU" if run.params.profile == "phantom" else record.device,
        "versions": ", ".join(f"{k} {v}" for k, v in record.versions.items() if k != "python"),
        "details": {key.replace("_", " "): _short(x) for key, x in record.details.items()},
        "settings": _settings(profile.get(run.primary.key, {})),
        "sides": ", ".join(map(str, profile["image_sizes"])),
        "split": _split(content["split"]),
        "kinds": _kinds(run),
        "images": len(labelled),
        "patients": labelled["patient_id"].nunique(),
        "counts": {split: _count(rows) for split, rows in by_split},
        "external_sites": ", ".join(sorted({*labelled["site"][labelled["split"] == "external"]})),
        "groups": len(sites),
        "lone_groups": sum(not group.several_classes for group in sites),
        "worst": worst_group(groups),
        "lone_classes": _lone_classes(labelled),
        "sources": "; ".join(
            f"{COLLECTION_NAMES[name]}: {_count(rows)}, {rows['site'].nunique()} sites"
            for name, rows in labelled.groupby("collection")
        ),
        "data_table": _data_table(labelled),
        "uar_tables": _by_split(run.uars, "within", WITHIN, "uar", run.names),
        "recall_tables": _by_split(run.recalls, "class", LABEL_NAMES, "recall", run.names),
        "probe_tables": _by_split(run.probe_uars, "within", WITHIN, "uar", VISIBLE_NAMES),
        "patient_table": _patient_table(run),
        "ranking_table": _ranking_table(run),
        "points_table": _points_table(run),
        "comparisons": run.comparisons.to_dict("records"),
        "points": points,
        "baselines": _listed(uars[uars["system"].isin(run.blind)], "system", run.names),
        "probes": _listed(probes, "probe", VISIBLE_NAMES),
    }


def percent(share: float) -> str:
    """Format as ``12.3 %``, and ``5 %`` if there is nothing behind the point."""
    return f"{100 * round(share, 4):.1f} %".replace(".0 %", " %")


def _checkpoint(record: Record) -> str:
    if record.checkpoint is None:
        return "no checkpoint"
    commit = f"commit `{record.commit}`" if record.commit else "a local folder"
    return f"`{record.checkpoint}`, revision `{record.revision}`, {commit}"


def _settings(block: dict, prefix: str = "") -> str:
    """List the system's block of params.yaml; the checkpoint is named elsewhere."""
    parts = []
    for key, value in block.items():
        if isinstance(value, dict):
            parts.append(_settings(value, f"{prefix}{key}."))
        elif key not in ("checkpoint", "revision"):
            parts.append(f"{prefix}{key} `{value}`")
    return ", ".join(parts)


def _short(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _split(settings: dict) -> str:
    if settings["folds"]:
        how = f"Fold {settings['fold'] + 1} of {settings['folds']}"
    else:
        how = " / ".join(percent(settings[name]) for name in ("train", "val", "test"))
    sites = ", ".join(settings["external"])
    held_out = f"; sites held out: {sites}" if sites else ""
    return f"{how} by {settings['group']}, stratified by class and collection{held_out}"


def _kinds(run: Run) -> str:
    kinds = [system.record.kind for system in run.systems.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _count(rows: pd.DataFrame) -> str:
    return f"{len(rows):,} images of {rows['patient_id'].nunique():,} patients"


def _lone_classes(labelled: pd.DataFrame) -> dict[str, str]:
    """Return {class: modality} of the classes that occur in one of several modalities only."""
    found = labelled.groupby("label")["modality"].unique()
    several = labelled["modality"].nunique() > 1
    return {x: found[x][0] for x in LABELS if several and len(found.get(x, ())) == 1}


def _listed(uars: pd.DataFrame, column: str, names: Mapping[str, str]) -> str:
    return "; ".join(f"{names[row[column]]} {percent(row['uar'])}" for _, row in uars.iterrows())


def _data_table(labelled: pd.DataFrame) -> str:
    """Count images and patients of each class of each collection by split."""
    patients = labelled.groupby(["label", "collection", "split"])["patient_id"]
    cells = patients.agg(lambda ids: f"{len(ids):,} ({ids.nunique():,})").unstack(fill_value="0")
    cells = cells.reindex(columns=[split for split in SPLITS if split in cells])
    rows = [
        [LABEL_NAMES[label], COLLECTION_NAMES[collection], *row]
        for (label, collection), row in zip(cells.index, cells.to_numpy(), strict=True)
    ]
    return markdown(["class", "collection", *cells.columns], rows)


def _by_split(
    table: pd.DataFrame, across: str, heads: Mapping[str, str], value: str, names: Mapping[str, str]
) -> dict[str, str]:
    """Return {split: table of `value` with limits: a line each, a column per `across`}."""
    key, tables = table.columns[0], {}
    for split, rows in table.groupby("split"):
        columns = [column for column in heads if column in set(rows[across])]
        cells = rows.assign(cell=[_interval(*x) for x in rows[[value, "low", "high"]].to_numpy()])
        cells = cells.pivot(index=key, columns=across, values="cell").reindex(columns=columns)
        cells = cells.reindex([name for name in names if name in cells.index]).fillna("–")
        lines = [
            [names[name], *line] for name, line in zip(cells.index, cells.to_numpy(), strict=True)
        ]
        head = [value.replace("uar", "UAR"), *(heads[column] for column in columns)]
        tables[split] = markdown(head, lines)
    return tables


def _patient_table(run: Run) -> str:
    """UAR per patient of every system, with AUROC within CT and X-ray."""
    rows = []
    for key, name in run.names.items():
        for split, own in run.found[key].items():
            figures = own.patients
            uar = _interval(*(figures[f"uar{suffix}"] for suffix in SUFFIXES))
            rows.append([name, split, uar, *_within(figures)])
    heads = [f"AUROC within {name}" for name in MODALITY_NAMES.values()]
    return markdown(["per patient", "split", "UAR", *heads], rows)


def _ranking_table(run: Run) -> str:
    """AUROC and calibration of every system that is not blind."""
    rows = []
    for key in (key for key in run.names if key not in run.blind):
        for split, own in run.found[key].items():
            ece = "{:.3f} ({:.3f} to {:.3f})".format(*(own.ranking[f"ece{x}"] for x in SUFFIXES))
            rows.append([run.names[key], split, *_within(own.ranking), ece])
    heads = [f"AUROC within {name}" for name in MODALITY_NAMES.values()]
    return markdown(["per image", "split", *heads, "calibration error"], rows)


def _within(figures: dict) -> list[str]:
    """Format the AUROC within each modality."""
    values = [[figures.get(f"auroc_within{x}", {}).get(m) for x in SUFFIXES] for m in MODALITIES]
    return ["–" if x[0] is None else "{:.3f} ({:.3f} to {:.3f})".format(*x) for x in values]


def _points_table(run: Run) -> str:
    """Sensitivity and specificity of the primary system at the thresholds of validation."""
    rows = []
    for split, own in run.found[run.primary.key].items():
        for row in own.points.to_dict("records"):
            sensitivity, specificity = (
                _interval(*(row[f"{name}{suffix}"] for suffix in SUFFIXES))
                for name in ("sensitivity", "specificity")
            )
            cells = [MODALITY_NAMES[row["modality"]], split, TARGETS[row["target"]]]
            rows.append([*cells, sensitivity, specificity, percent(row["best"])])
    head = ["within", "split", "set on validation to", "sensitivity", "specificity"]
    return markdown([*head, "best on these images"], rows) if rows else ""


def _interval(value: float, low: float, high: float) -> str:
    value, low, high = (100 * round(x, 4) for x in (value, low, high))  # as in metrics files
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
