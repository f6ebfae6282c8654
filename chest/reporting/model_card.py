"""The model card and the checklist, filled from a run so that neither can go stale."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chest.core.labels import (
    COLLECTION_NAMES,
    LABEL_NAMES,
    LABELS,
    MODALITY_NAMES,
    SPLITS,
)
from chest.core.params import Params
from chest.core.tables import markdown
from chest.data.regions import VISIBLE_NAMES
from chest.evaluation.comparison import ONE_RUN
from chest.evaluation.predictions import System
from chest.evaluation.subgroups import Group, worst_group
from chest.reporting import control_tables
from chest.reporting.scores import Scores, ScoresBySystem
from chest.reporting.wording import WITHIN, format_interval, format_points, percent

TEMPLATES = Path(__file__).parent / "templates"
NOTICE = (
    "**This is research on public data. It is no diagnosis, no medical device, and must not be used"
    "\non patients.**"
)
PHANTOM = (
    "\n\n> **Phantom run.** The images are drawn and the checkpoints began with random weights: no"
    "\n> figure below says anything about real lungs."
)
TARGETS = {"sensitivity_90": "sensitivity 90 %", "specificity_70": "specificity 70 %"}


@dataclass(frozen=True)
class Run:
    """What `evaluate` found out about a run.

    ``labelled``: the manifest with the column split; ``uars``, ``recalls``, ``probe_uars``: the
    tables uar, recall and probes of plots/; ``leaks``: metrics/audit.json; ``controls``: the table
    controls of plots/; ``comparisons``: see `primary_comparisons`.
    """

    params: Params
    labelled: pd.DataFrame
    systems: dict[str, System]
    primary: System
    scores: ScoresBySystem
    uars: pd.DataFrame
    recalls: pd.DataFrame
    probe_uars: pd.DataFrame
    leaks: dict
    controls: pd.DataFrame
    comparisons: list[dict]

    @property
    def names(self) -> dict[str, str]:
        return {key: system.name for key, system in self.systems.items()}

    @property
    def blind(self) -> list[str]:
        return [key for key, system in self.systems.items() if system.record.kind == "blind"]

    @property
    def own(self) -> dict[str, Scores]:
        """The figures of the primary system by split."""
        return self.scores[self.primary.key]

    @property
    def baselines(self) -> dict[str, float]:
        """{modality: UAR on test of the blind baseline that was chosen on validation}."""
        return {row["modality"]: row["baseline_uar"] for row in self.comparisons}

    @property
    def triage(self) -> dict[str, float]:
        """{modality: threshold of the primary system for a sensitivity of 90 % on validation}."""
        points = [row for row in self.own["test"].points if row["target"] == "sensitivity_90"]
        return {row["modality"]: row["threshold"] for row in points}

    @cached_property
    def records(self) -> dict[str, dict]:
        """The record of each system as Git tracks it; see `tracked_record`."""
        return {key: tracked_record(x, self.params.profile) for key, x in self.systems.items()}

    @property
    def record(self) -> dict:
        return self.records[self.primary.key]

    @property
    def settings(self) -> dict:
        """The block of the profile in params.yaml."""
        return self.params.content[self.params.profile]

    @property
    def site_groups(self) -> list[Group]:
        """The primary system within each site and collection of the test split."""
        return [group for group in self.own["test"].groups if group.kind == "site_collection"]

    def rows(self, split: str) -> pd.DataFrame:
        return self.labelled[self.labelled["split"] == split]

    def sites(self, split: str) -> set[str]:
        return set(self.rows(split)["site"])


def tracked_record(system: System, profile: str) -> dict:
    """Return the record of a system for Git-tracked files: floats of 4 digits.

    Phantom runs give the same results on all processors and builds of PyTorch, so what differs
    between those is left out of theirs.
    """
    record = system.record.model_dump()
    if profile == "phantom":
        if (record["device"] or "").startswith("CPU"):
            record["device"] = "CPU"
        record["versions"] = {
            name: version.partition("+")[0]
            for name, version in record["versions"].items()
            if name != "python"
        }
    details = record["details"].items()
    record["details"] = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in details}
    return record


def render(template: str, run: Run) -> str:
    """Fill templates/`template`, ``model_card.md`` or ``claim.md``."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    functions = (checkpoint, count, data_table, interval_tables, list_uars, lone_classes)
    functions += (change_table, image_table, need_image, settings, split_text, worst_group)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {
        "ONE_RUN": ONE_RUN,
        "LABEL_NAMES": LABEL_NAMES,
        "MODALITY_NAMES": MODALITY_NAMES,
        "COLLECTION_NAMES": COLLECTION_NAMES,
        "VISIBLE_NAMES": VISIBLE_NAMES,
        "WITHIN": WITHIN,
        "TARGETS": TARGETS,
    }
    environment.filters |= {"percent": percent, "points": format_points}
    environment.filters |= {"interval": interval, "decimals": decimals, "auroc": auroc}
    notice = NOTICE + (PHANTOM if run.params.profile == "phantom" else "")
    return environment.get_template(template).render(run=run, notice=notice)


# --- What the templates call -----------------------------------------------------------------


def checkpoint(record: dict) -> str:
    """Name the checkpoint that a system started from."""
    if record["checkpoint"] is None:
        return "no checkpoint"
    commit = f"commit `{record['commit']}`" if record["commit"] else "a local folder"
    return f"`{record['checkpoint']}`, revision `{record['revision']}`, {commit}"


def settings(block: dict, prefix: str = "") -> str:
    """List a system's block of params.yaml; the checkpoint is named elsewhere."""
    parts = []
    for key, value in block.items():
        if isinstance(value, dict):
            parts.append(settings(value, f"{prefix}{key}."))
        elif key not in ("checkpoint", "revision"):
            parts.append(f"{prefix}{key} `{value}`")
    return ", ".join(parts)


def split_text(block: dict) -> str:
    """Describe the block `split` of params.yaml."""
    if block["folds"]:
        how = f"Fold {block['fold'] + 1} of {block['folds']}"
    else:
        how = " / ".join(f"{100 * block[name]:g} %" for name in ("train", "val", "test"))
    sites = ", ".join(block["external"])
    held_out = f"; sites held out: {sites}" if sites else ""
    return f"{how} by {block['group']}, stratified by class and collection{held_out}"


def count(rows: pd.DataFrame) -> str:
    """Count the images and the patients of some rows of the manifest."""
    return f"{len(rows):,} images of {rows['patient_id'].nunique():,} patients"


def lone_classes(labelled: pd.DataFrame) -> dict[str, str]:
    """Return {class: modality} of the classes that occur in one of several modalities only."""
    found = labelled.groupby("label")["modality"].unique()
    several = labelled["modality"].nunique() > 1
    return {x: found[x][0] for x in LABELS if several and len(found.get(x, ())) == 1}


def list_uars(uars: pd.DataFrame, names: Mapping[str, str]) -> str:
    """List the UAR on all test images of each of `names`: keys in the first column of `uars`."""
    rows = uars[(uars["split"] == "test") & (uars["within"] == "all")]
    found = zip(rows.iloc[:, 0], rows["uar"], strict=True)
    return "; ".join(f"{names[key]} {percent(uar)}" for key, uar in found if key in names)


def data_table(labelled: pd.DataFrame) -> str:
    """Count images and patients of each class of each collection by split."""
    patients = labelled.groupby(["label", "collection", "split"])["patient_id"]
    cells = patients.agg(lambda ids: f"{len(ids):,} ({ids.nunique():,})").unstack(fill_value="0")
    cells = cells.reindex(columns=[split for split in SPLITS if split in cells])
    rows = [
        [LABEL_NAMES[label], COLLECTION_NAMES[collection], *row]
        for (label, collection), row in zip(cells.index, cells.to_numpy(), strict=True)
    ]
    return markdown(["class", "collection", *cells.columns], rows)


def interval_tables(
    table: pd.DataFrame, head: str, heads: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, str]:
    """Return {split: values with limits as Markdown}: a line per name, a column per head.

    `table` has the columns key, split, part, value, low and high under any names, in this order:
    the key is one of `names`, the part one of `heads`.
    """
    table = table.iloc[:, :6].set_axis(["key", "split", "part", "value", "low", "high"], axis=1)
    limits = table[["value", "low", "high"]].to_numpy()
    table = table.assign(cell=[format_interval(*row) for row in limits])
    tables = {}
    for split, rows in table.groupby("split"):
        cells = rows.pivot(index="key", columns="part", values="cell").fillna("–")
        cells = cells.reindex(
            index=[key for key in names if key in cells.index],
            columns=[key for key in heads if key in cells],
        )
        lines = [
            [names[key], *line] for key, line in zip(cells.index, cells.to_numpy(), strict=True)
        ]
        tables[split] = markdown([head, *(heads[key] for key in cells)], lines)
    return tables


def need_image(controls: pd.DataFrame, names: Mapping[str, str]) -> str:
    """List whether the result of each system with controls needs the image."""
    return "\n".join(f"- {said}" for said in control_tables.need_image(controls, names))


def image_table(controls: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Return the UAR on test with the image, without it, and with each prior, as Markdown."""
    return markdown(control_tables.IMAGE_HEAD, control_tables.image_rows(controls, names))


def change_table(controls: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Return how many answers to test images other conditions change, as Markdown."""
    return markdown(control_tables.CHANGE_HEAD, control_tables.change_rows(controls, names))


def interval(figures: Mapping[str, float], name: str) -> str:
    """Return the share `name` with its limits."""
    return format_interval(*_limits(figures, name))


def decimals(figures: Mapping[str, float], name: str) -> str:
    """Return the figure `name` with its limits, to three places."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*_limits(figures, name))


def auroc(figures: Mapping[str, dict], modality: str) -> str:
    """Return the AUROC within `modality` with its limits, if there is one."""
    own = {
        name: x[modality]
        for name, x in figures.items()
        if name.startswith("auroc_within") and modality in x
    }
    return decimals(own, "auroc_within") if own else "–"


def _limits(figures: Mapping[str, float], name: str) -> list[float]:
    return [figures[name], figures[f"{name}_low"], figures[f"{name}_high"]]
