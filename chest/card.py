"""The model card and the checklist, filled from a run so that neither can go stale."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chest.floors import FLOORS
from chest.labels import COLLECTION_NAMES, LABEL_NAMES, LABELS, MODALITY_NAMES, SPLITS
from chest.params import Params
from chest.systems import PROBE_NAMES, TRAINED
from chest.tables import markdown

TEMPLATES = Path(__file__).parent / "templates"
NOTICE = (
    "**This is research on public data. It is no diagnosis, no medical device, and must not be used"
    "\non patients.**"
)
PHANTOM = (
    "\n\n> **Phantom run.** The images are drawn and the checkpoints began with random weights: no"
    "\n> figure below says anything about real lungs."
)
WITHIN = {"all": "all images"} | {kind: f"within {name}" for kind, name in MODALITY_NAMES.items()}


@dataclass(frozen=True)
class Run:
    """What a run knows of itself, as `evaluate` computed it.

    ``records``: {system: how its answers came about}; ``names``: {system: its name for people};
    ``labelled``: the manifest with the column split; ``uars``, ``recalls``, ``probes``: the tables
    of plots/; ``within``: metrics/within.csv; ``leaks``: metrics/audit.json; ``ranking``: that of
    the fine-tuned system.
    """

    params: Params
    records: dict[str, dict]
    names: dict[str, str]
    labelled: pd.DataFrame
    uars: pd.DataFrame
    recalls: pd.DataFrame
    probes: pd.DataFrame
    within: pd.DataFrame
    leaks: dict
    ranking: dict


def render(template: str, run: Run) -> str:
    """Fill templates/`template`, ``model_card.md`` or ``claim.md``; raises where a value lacks."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(_values(run))


def percent(share: float) -> str:
    """``12.3 %``, and ``5 %`` where there is nothing behind the point."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def _values(run: Run) -> dict:
    """What the templates ask for."""
    test = run.labelled[run.labelled["split"] == "test"]
    sites = run.within[(run.within["system"] == TRAINED) & (run.within["within"] == "site")]
    overall = run.probes[run.probes["within"] == "all"].set_index("probe")["uar"]
    floors = run.uars[(run.uars["within"] == "all") & run.uars["system"].isin(FLOORS)]
    modalities = run.labelled.groupby("label")["modality"].unique()
    return {
        "notice": NOTICE + (PHANTOM if run.params.profile == "phantom" else ""),
        "params": run.params,
        "settings": run.params.chosen.finetune_siglip,
        "record": run.records[TRAINED],
        "leaks": run.leaks,
        "ranking": run.ranking,
        "label_names": LABEL_NAMES,
        "modality_names": MODALITY_NAMES,
        "images": len(run.labelled),
        "patients": run.labelled["patient_id"].nunique(),
        "test_images": len(test),
        "test_patients": test["patient_id"].nunique(),
        "sites": len(sites),
        "lone_sites": int((sites["note"] != "").sum()),
        "lone_classes": {x: modalities[x][0] for x in LABELS if len(modalities.get(x, ())) == 1},
        "hidden": overall["lungs_hidden"],
        "visible": overall["everything"],
        "floors": "; ".join(f"{run.names[s]}: UAR {percent(uar)}" for s, uar in
                            zip(floors["system"], floors["uar"], strict=True)),
        "sources": "; ".join(
            f"{COLLECTION_NAMES[name]}: {len(rows):,} images of {rows['patient_id'].nunique():,}"
            f" patients, {rows['site'].nunique()} sites"
            for name, rows in run.labelled.groupby("collection")
        ),
        "data_table": _data_table(run.labelled),
        "uar_table": _figures(run.uars, "system", run.names, "within", WITHIN, "uar"),
        "recall_table": _figures(run.recalls, "system", run.names, "class", LABEL_NAMES, "recall"),
        "probe_table": _figures(run.probes, "probe", PROBE_NAMES, "within", WITHIN, "uar"),
    }  # fmt: skip


def _data_table(labelled: pd.DataFrame) -> str:
    """Images and patients of each class of each collection by split."""
    patients = labelled.groupby(["label", "collection", "split"])["patient_id"]
    cells = patients.agg(lambda ids: f"{len(ids):,} ({ids.nunique():,})").unstack(fill_value="0")
    cells = cells.reindex(columns=list(SPLITS), fill_value="0")
    rows = [
        [LABEL_NAMES[label], COLLECTION_NAMES[collection], *row]
        for (label, collection), row in zip(cells.index, cells.to_numpy(), strict=True)
    ]
    return markdown(["class", "collection", *SPLITS], rows)


def _figures(
    table: pd.DataFrame, by: str, names: dict, across: str, heads: dict, figure: str
) -> str:
    """`figure` with its limits: a line for each `by`, a column for each `across`."""
    columns = list(dict.fromkeys(table[across]))
    rows = []
    for key, own in table.groupby(by, sort=False):
        values = own.set_index(across)[[figure, "low", "high"]].reindex(columns)
        rows.append([names[key], *(_interval(*limits) for limits in 100 * values.to_numpy())])
    return markdown([figure.replace("uar", "UAR"), *(heads[column] for column in columns)], rows)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
