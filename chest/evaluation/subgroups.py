"""Figures within groups: modality, site, collection, site and collection, and severity.

Across modalities and sites a system can answer without looking at the lungs; within one it cannot.
Within a site the collection may still tell the class: groups by site *and* collection count most.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from chest.core.labels import COLLECTION_NAMES, LABELS, MODALITIES, MODALITY_NAMES
from chest.data.dataset import SLICE_INDEX
from chest.evaluation.intervals import Interval, Intervals, intervals

UNKNOWN = Interval(math.nan, math.nan, math.nan)
FEWEST_PATIENTS = 5  # of a class in a group that may be called the worst


@dataclass(frozen=True)
class Group:
    """A part of one system's answers.

    ``kind`` is all, modality, site, collection, site_collection or severity; ``key`` names the
    group in metrics files and ``name`` for people. ``found`` has recalls of the classes that occur;
    its UAR means something only if there are several.
    """

    kind: str
    key: str
    name: str
    rows: pd.DataFrame
    found: Intervals

    @property
    def several_classes(self) -> bool:
        return len(self.found.recall) > 1

    @property
    def note(self) -> str:
        if self.several_classes:
            return ""
        return f"one class only ({next(iter(self.found.recall))}): recall only"


def score_all(answers: pd.DataFrame, seed: int) -> Group:
    """Score all of a system's answers."""
    return Group("all", "all", "all images", answers, intervals(answers, seed))


def score_groups(
    answers: pd.DataFrame, seed: int, severity: pd.Series | None = None
) -> list[Group]:
    """Score one system's answers (see `predictions.System`) within each group that has images.

    `severity` is what `read_severity` returns; without it there are no groups by severity. An
    answer that names a class of another modality is wrong.
    """
    return [
        Group(kind, key, name, rows, intervals(rows, seed))
        for kind, key, name, rows in _parts(answers, severity)
    ]


def read_severity() -> pd.Series:
    """Return the grade (``CT-0`` to ``CT-4``) of each study of the CT volumes, indexed by study.

    MosMedData sorts its volumes into folders by the share of the lungs that is affected: none, up
    to 25 %, 50 %, 75 %, and more. Studies in no such folder are left out.
    """
    table = pd.read_csv(SLICE_INDEX, dtype=str, keep_default_na=False)
    grade = table["volume"].str.extract(r"\b(CT-[0-4])\b", expand=False)
    return grade.set_axis(table["study"]).dropna()


def tabulate_groups(system: str, groups: list[Group]) -> pd.DataFrame:
    """Return one row per group; unknown figures are empty and ``note`` says why.

    Columns: system, within, group, images, patients, <class>_images, uar, <class>_recall (each with
    _low and _high, 4 places), note.
    """
    rows = []
    for group in groups:
        actual, recall = group.rows["actual"], group.found.recall
        figures = (group.found.uar if group.several_classes else UNKNOWN).as_dict("uar")
        for label in LABELS:
            figures |= recall.get(label, UNKNOWN).as_dict(f"{label}_recall")
        rows.append(
            {
                "system": system,
                "within": group.kind,
                "group": group.name,
                "images": len(group.rows),
                "patients": group.rows["patient_id"].nunique(),
                **{f"{label}_images": int((actual == label).sum()) for label in LABELS},
                **{name: round(value, 4) for name, value in figures.items()},
                "note": group.note,
            }
        )
    return pd.DataFrame(rows)


def nest_groups(groups: list[Group]) -> dict:
    """Return {key: {uar, uar_low, uar_high, recall: {class: x}, images}} for a metrics file.

    A group of one class has no UAR.
    """
    return {
        group.key: {
            **(group.found.uar.as_dict("uar") if group.several_classes else {}),
            "recall": {label: interval.value for label, interval in group.found.recall.items()},
            "images": len(group.rows),
        }
        for group in groups
    }


@dataclass(frozen=True)
class Worst:
    """The class and the group with the lowest recall."""

    label: str
    group: str
    recall: Interval
    images: int
    patients: int


def worst_group(groups: list[Group]) -> Worst | None:
    """Return the lowest recall of any class in any group with at least 5 patients of it.

    None if there is no such group. Of equals, the one with most images.
    """
    cells = []
    for group in groups:
        for label, recall in group.found.recall.items():
            own = group.rows[group.rows["actual"] == label]
            if (patients := own["patient_id"].nunique()) >= FEWEST_PATIENTS:
                cells.append(Worst(label, group.name, recall, len(own), patients))
    return min(cells, key=lambda cell: (cell.recall.value, -cell.images), default=None)


def slug(name: str) -> str:
    """Return `name` in lower case, digits and underscores, as part of a metric's name."""
    return re.sub(r"\W+", "_", name.casefold()).strip("_")


def _parts(
    answers: pd.DataFrame, severity: pd.Series | None
) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Yield kind, key, name and rows of each group."""
    for modality in MODALITIES:
        if len(rows := answers[answers["modality"] == modality]):
            yield "modality", modality, MODALITY_NAMES[modality], rows
    for (modality, site), rows in answers.groupby(["modality", "site"]):
        name = f"{site} ({MODALITY_NAMES[modality]})"
        yield "site", f"site_{slug(name)}", name, rows
    for collection, rows in answers.groupby("collection"):
        name = COLLECTION_NAMES[collection]
        yield "collection", f"collection_{slug(collection)}", name, rows
    for (site, collection), rows in answers.groupby(["site", "collection"]):
        key = f"site_{slug(site)}_collection_{slug(collection)}"
        yield "site_collection", key, f"{site}, {COLLECTION_NAMES[collection]}", rows
    if severity is not None:
        volumes = answers[answers["collection"] == "ct_volumes"]
        for grade, rows in volumes.groupby(volumes["study"].map(severity)):
            yield "severity", f"severity_{slug(grade)}", grade, rows
