"""COVID-19 against normal within CT and within each hospital, tuberculosis within X-ray and county.

Across modalities and sites a system can answer without a look at the lungs; within one it cannot.
"""

import re
from dataclasses import dataclass

import pandas as pd

from chest.intervals import Intervals, intervals
from chest.labels import LABELS, MODALITIES, MODALITY_NAMES

LIMITS = {"": "value", "_low": "low", "_high": "high"}
COLUMNS = (
    "system", "within", "group", "images", "patients", *(f"{label}_images" for label in LABELS),
    *(f"uar{suffix}" for suffix in LIMITS),
    *(f"{label}_recall{suffix}" for label in LABELS for suffix in LIMITS), "note",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The images of a modality, or of a site: `found` is None where all are of one class.

    ``kind`` is modality or site, ``key`` names the group in metrics, ``name`` for people; ``rows``
    are its rows of the answers' table.
    """

    kind: str
    key: str
    name: str
    rows: pd.DataFrame
    found: Intervals | None


def score_modalities(table: pd.DataFrame, seed: int) -> list[Group]:
    """UAR and recalls, with intervals, within each modality that has images.

    `table` has actual, predicted, patient_id and modality. An answer that names a class of another
    modality is a wrong answer.
    """
    parts = {kind: table[table["modality"] == kind] for kind in MODALITIES}
    return [
        _score("modality", kind, MODALITY_NAMES[kind], rows, seed)
        for kind, rows in parts.items()
        if len(rows)
    ]


def score_sites(table: pd.DataFrame, seed: int) -> list[Group]:
    """The same within each site of each modality; `table` has the column site, too."""
    parts = {
        f"{site} ({MODALITY_NAMES[kind]})": rows
        for (kind, site), rows in table.groupby(["modality", "site"], sort=True)
    }
    return [_score("site", f"site_{slug(name)}", name, rows, seed) for name, rows in parts.items()]


def _score(kind: str, key: str, name: str, rows: pd.DataFrame, seed: int) -> Group:
    found = intervals(rows, seed) if rows["actual"].nunique() > 1 else None
    return Group(kind, key, name, rows, found)


def tabulate_within(system: str, groups: list[Group]) -> pd.DataFrame:
    """One row a group, COLUMNS; what cannot be said is empty, and `note` says why."""
    rows = [
        {
            "system": system,
            "within": group.kind,
            "group": group.name,
            "images": len(group.rows),
            "patients": group.rows["patient_id"].nunique(),
            **{f"{x}_images": int((group.rows["actual"] == x).sum()) for x in LABELS},
            **(_figures(group.found) if group.found else {"note": _one_class(group)}),
        }
        for group in groups
    ]
    return pd.DataFrame(rows, columns=COLUMNS).astype(object).fillna("")


def nest_within(groups: list[Group]) -> dict:
    """{key: {uar, uar_low, uar_high, recall: {class: x}, images}} of groups of several classes."""
    return {
        group.key: {
            **{f"uar{suffix}": getattr(group.found.uar, x) for suffix, x in LIMITS.items()},
            "recall": {label: interval.value for label, interval in group.found.recall.items()},
            "images": len(group.rows),
        }
        for group in groups
        if group.found
    }


def slug(name: str) -> str:
    """`name` in small letters, digits and underscores, as part of a metric's name."""
    return re.sub(r"\W+", "_", name.casefold()).strip("_")


def _figures(found: Intervals) -> dict[str, float]:
    named = {"uar": found.uar, **{f"{label}_recall": x for label, x in found.recall.items()}}
    return {
        f"{name}{suffix}": round(getattr(interval, limit), 4)
        for name, interval in named.items()
        for suffix, limit in LIMITS.items()
    }


def _one_class(group: Group) -> str:
    return f"one class only ({group.rows['actual'].iloc[0]}): nothing to tell apart"
