"""The runs of `tools/real.py`: what each answered, and which of them belong together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.files import read_table
from chest.core.labels import DISEASES
from chest.data.dataset import MANIFEST_COLUMNS, SPLIT_COLUMNS
from chest.evaluation.calibration import calibration_metrics
from chest.evaluation.comparison import pooled
from chest.evaluation.intervals import Interval
from chest.evaluation.predictions import Record, part_of, read_system
from chest.evaluation.repeated import mean_auroc
from chest.evaluation.roc import disease_scores, thresholds

DONE, PLANNED = "done.json", "plan.json"
KEYS = ("protocol", "system", "view", "variant")
TARGET = "sensitivity_90"  # of the thresholds that validation freezes
SEED = 42  # of the bootstrap


@dataclass(frozen=True)
class RealRun:
    """A finished run, or one of the systems in it.

    ``labels`` are those of the plan (part, KEYS, fold, seed), ``key`` is the system's file name.
    """

    folder: Path
    labels: Mapping
    key: str
    record: Record
    answers: pd.DataFrame
    seconds: float
    commit: str

    @property
    def curve(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"data/training/{self.key}.csv")

    @property
    def validated(self) -> float:
        """Mean UAR within modality on validation, of the epoch that was kept."""
        kept = self.record.details["best_epoch"]
        return float(self.curve.set_index("epoch").loc[kept, "val_within"])

    @cached_property
    def decided(self) -> pd.DataFrame:
        """The answers at the threshold that gives TARGET on validation."""
        chosen, parts = thresholds(part_of(self.answers, "val")), []
        for modality, disease in DISEASES.items():
            rows, _, score = disease_scores(self.answers, modality)
            if modality in chosen:
                said = np.where(score >= chosen[modality][TARGET], disease, "normal")
                parts.append(rows.assign(predicted=said))
        return pd.concat(parts) if parts else self.answers.iloc[:0]


@dataclass(frozen=True)
class Group:
    """Training runs of one system that answered the same images, one table each.

    ``answers`` are the system's own answers, ``decided`` those at frozen thresholds.
    """

    answers: Sequence[pd.DataFrame]
    decided: Sequence[pd.DataFrame]

    def of(self, modality: str, site: str | None = None) -> "Group":
        """Return the answers to the images of a modality, or of one hospital in it."""
        return Group(*([_part(x, modality, site) for x in side] for side in self.sides))

    @property
    def sides(self) -> tuple[Sequence[pd.DataFrame], Sequence[pd.DataFrame]]:
        return self.answers, self.decided


class RealRuns:
    """The planned runs below a folder: their labels, and the answers of those that are done.

    PLANNED lists them: labels, and ``done``, the folder of a run whose answers are those of today's
    parameters, data and code, else null.
    """

    def __init__(self, into: Path):
        self.into = into
        self.planned: list[dict] = json.loads((into / PLANNED).read_text(encoding="utf-8"))
        folders = sorted({x.pop("done") for x in self.planned} - {None})
        self.runs = [run for folder in folders for run in read_runs(into / folder)]

    def find(self, key: str = "", **labels) -> list[RealRun]:
        """Return the runs with these labels, of the system `key` if it is given, by seed, fold."""
        found = [
            run
            for run in self.runs
            if labels.items() <= run.labels.items() and key in ("", run.key)
        ]
        return sorted(found, key=lambda run: (run.labels["seed"], run.labels["fold"]))

    def within(self, key: str = "", **labels) -> Group | None:
        """Return the pooled folds of each seed, every image tested once; None if none is whole.

        A seed counts if all folds that are planned for it are there.
        """
        found, groups = self.find(key, **labels), []
        for seed in sorted({run.labels["seed"] for run in found}):
            own = [run for run in found if run.labels["seed"] == seed]
            planned = [x for x in self.planned if labels.items() <= x.items() and x["seed"] == seed]
            if {run.labels["fold"] for run in own} == {x["fold"] for x in planned}:
                groups.append(own)
        return _group(groups, "test")

    def across(self, key: str = "", **labels) -> Group | None:
        """Return the answers to the hospital held out, one table for each run."""
        return apart(self.find(key, **labels), "external")


def read_runs(folder: Path) -> Iterator[RealRun]:
    """Yield each system that a finished run answered with."""
    labels = json.loads((folder / DONE).read_text(encoding="utf-8"))
    known = {key: labels.pop(key) for key in ("digest", "seconds", "commit")}
    manifest = read_table(folder / "data/manifest.csv", MANIFEST_COLUMNS)
    split = read_table(folder / "data/split.csv", SPLIT_COLUMNS)
    labelled = manifest.assign(split=split["split"])
    place = folder / "data/predictions"
    for path in sorted(place.glob("*.csv")):
        system = read_system(path.stem, labelled, place)
        facts = (system.record, system.answers, known["seconds"], known["commit"])
        yield RealRun(folder, labels, path.stem, *facts)


def figures(group: Group, modality: str, site: str | None = None) -> dict:
    """Return the figures of a system within a modality, means over its runs.

    Keys: runs, images, patients, diseased; with 95 % intervals (``_low``, ``_high``) uar, auroc,
    recall_disease, recall_normal, and sensitivity and specificity at the frozen threshold; ece and
    brier, means over the runs. The intervals are over patients and, of several runs, over runs.
    """
    own, disease = group.of(modality, site), DISEASES[modality]
    first = own.answers[0]
    counts = {"runs": len(own.answers), "images": len(first)}
    counts["patients"] = first["patient_id"].nunique()
    counts["diseased"] = int((first["actual"] == disease).sum())
    answered = pooled(own.answers, SEED)
    found = {"uar": answered.uar, "auroc": mean_auroc(own.answers, modality, SEED)}
    found |= {
        "recall_disease": answered.recall[disease],
        "recall_normal": answered.recall["normal"],
    }
    if all(map(len, own.decided)):
        frozen = pooled(own.decided, SEED).recall
        found |= {"sensitivity": frozen[disease], "specificity": frozen["normal"]}
    calibrated = [calibration_metrics(table, SEED) for table in own.answers]
    means = {key: float(np.mean([x[key] for x in calibrated])) for key in ("ece", "brier")}
    return counts | spread(found) | means


def spread(found: Mapping[str, Interval]) -> dict[str, float]:
    """Return values and limits of intervals as columns."""
    return {key: x for name, own in found.items() for key, x in own.as_dict(name).items()}


def together(runs: Sequence[RealRun], split: str) -> Group | None:
    """Return the answers of `runs` to the images of a split in one table."""
    return _group([runs] if runs else [], split)


def apart(runs: Sequence[RealRun], split: str) -> Group | None:
    """Return the answers of `runs` to the images of a split, one table for each run."""
    return _group([[run] for run in runs], split)


def _group(groups: Sequence[Sequence[RealRun]], split: str) -> Group | None:
    if not groups:
        return None
    sides = [
        [pd.concat([part_of(table(run), split) for run in runs]) for runs in groups]
        for table in (lambda run: run.answers, lambda run: run.decided)
    ]
    return Group(*sides) if len(sides[0][0]) else None


def _part(table: pd.DataFrame, modality: str, site: str | None) -> pd.DataFrame:
    chosen = table["modality"] == modality
    return table[chosen if site is None else chosen & (table["site"] == site)]
