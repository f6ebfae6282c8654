"""All figures of a system on one split, and the tables that metrics files and plots are made of."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from chest.core.labels import EVALUATED, MODALITIES
from chest.evaluation.calibration import calibration_metrics
from chest.evaluation.intervals import Interval, Intervals, intervals
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.patients import per_patient
from chest.evaluation.predictions import System
from chest.evaluation.roc import disease_scores, operating_points, roc_metrics, thresholds
from chest.evaluation.subgroups import Group, score_groups

ALL = "all"  # images of both modalities
BINS = 20  # of the histograms of scores


@dataclass(frozen=True)
class Scores:
    """Figures of one system on one split.

    ``answers``: see `predictions.System`. ``found``: over all images; ``headline``: the same as
    metrics. ``groups``: within modality, site and so on. ``ranking``: `roc_metrics`,
    `calibration_metrics` and, as ``points``, `operating_points`, whose table is ``points``; it is
    empty if the system did not answer the validation split. ``patients``: what `headline` and
    `roc_metrics` give for the mean answer per patient.
    """

    answers: pd.DataFrame
    found: Intervals
    headline: dict
    groups: list[Group]
    ranking: dict
    points: pd.DataFrame
    patients: dict


Found = dict[str, dict[str, Scores]]  # {system: {split: figures}}


def score_system(system: System, seed: int, severity: pd.Series | None) -> dict[str, Scores]:
    """Score a system on each of EVALUATED that it answered; `severity` as in `score_groups`."""
    cuts = thresholds(system.of("val"))
    return {
        split: _score(system.of(split), cuts, seed, severity)
        for split in EVALUATED
        if split in system.splits
    }


def _score(
    answers: pd.DataFrame, cuts: dict[str, dict[str, float]], seed: int, severity: pd.Series | None
) -> Scores:
    found, patients = intervals(answers, seed), per_patient(answers)
    points = operating_points(answers, cuts, seed)
    ranking = roc_metrics(answers, seed) | calibration_metrics(answers, seed)
    return Scores(
        answers=answers,
        found=found,
        headline=_headline(answers, found),
        groups=score_groups(answers, seed, severity),
        ranking=ranking | ({"points": nest_points(points)} if len(points) else {}),
        points=points,
        patients=headline(patients, seed) | roc_metrics(patients, seed),
    )


def headline(answers: pd.DataFrame, seed: int) -> dict:
    """Return `classification_metrics` with the limits of the 95 % intervals beside the values.

    ``uar_low`` and ``uar_high`` stand beside ``uar``; ``recall_low`` and ``recall_high`` hold the
    limits of each class.
    """
    return _headline(answers, intervals(answers, seed))


def _headline(answers: pd.DataFrame, found: Intervals) -> dict:
    metrics = classification_metrics(answers["actual"], answers["predicted"])
    recall = metrics.pop("recall")
    limits = _limits("uar", found.uar, "uar_") | _limits("war", found.war, "war_")
    return {
        **limits,
        "recall": recall,
        "recall_low": {label: found.recall[label].low for label in recall},
        "recall_high": {label: found.recall[label].high for label in recall},
        **{key: value for key, value in metrics.items() if key not in limits},
    }


def nest_points(points: pd.DataFrame) -> dict:
    """Return {modality: {target: {threshold, sensitivity, sensitivity_low, …, best}}}."""
    nested: dict = {}
    for row in points.to_dict("records"):
        nested.setdefault(row.pop("modality"), {})[row.pop("target")] = row
    return nested


def uar_rows(column: str, system: System, seed: int) -> list[dict]:
    """Return rows of ``plots/uar.csv`` and ``plots/probes.csv``: all images, then each modality.

    `column` is the name of the first column, which holds the system's key. A modality with images
    of one class has no row. ``bar`` names the row: `dvc plots` compares revisions by it.
    """
    rows = []
    for split in (split for split in EVALUATED if split in system.splits):
        answers = system.of(split)
        groups = score_groups(answers, seed, kinds=("modality",))
        parts = [(ALL, answers, intervals(answers, seed))]
        parts += [(group.key, group.rows, group.found) for group in groups if group.several_classes]
        rows += [
            {column: system.key, "split": split, "within": within, **_limits("uar", found.uar)}
            | {"n": len(part), "bar": _bar(system.key, within, split)}
            for within, part, found in parts
        ]
    return rows


def nest_uars(uars: pd.DataFrame) -> dict:
    """Return {probe: {uar, uar_low, uar_high, uar_ct, …, external: …}} of ``plots/probes.csv``."""
    nested: dict = {}
    for row in uars.to_dict("records"):
        figures = nested.setdefault(row["probe"], {})
        if row["split"] == "external":
            figures = figures.setdefault("external", {})
        name = "uar" if row["within"] == ALL else f"uar_{row['within']}"
        figures |= {name: row["uar"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    return nested


def recall_rows(key: str, found: dict[str, Scores]) -> list[dict]:
    """Return rows of ``plots/recall.csv``, one per split and class; see `uar_rows`."""
    return [
        {"system": key, "split": split, "class": label, **_limits("recall", interval)}
        | {"n": int((scores.answers["actual"] == label).sum()), "bar": _bar(key, label, split)}
        for split, scores in found.items()
        for label, interval in scores.found.recall.items()
    ]


def score_bins(split: str, answers: pd.DataFrame) -> pd.DataFrame:
    """Count images by disease score, modality and class: split, modality, class, low, high, n."""
    edges = np.linspace(0, 1, BINS + 1)
    parts = []
    for modality in MODALITIES:
        rows, _, score = disease_scores(answers, modality)
        for label in sorted(set(rows["actual"])):
            counts, _ = np.histogram(score[(rows["actual"] == label).to_numpy()], edges)
            names = {"split": split, "modality": modality, "class": label}
            bins = {"low": edges[:-1].round(4), "high": edges[1:].round(4), "n": counts}
            parts.append(pd.DataFrame(names | bins))
    return pd.concat(parts, ignore_index=True)


def worst_mistakes(answers: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong answers, those with the least probability of the true class first.

    The columns ``truth`` and ``probability`` are added: that of the true class and of the answer,
    NaN for an unparsed one.
    """
    wrong = answers[answers["actual"] != answers["predicted"]]
    columns = {"truth": "actual", "probability": "predicted"}
    named = {
        name: [row.get(row[column], np.nan) for row in wrong.to_dict("records")]
        for name, column in columns.items()
    }
    return wrong.assign(**named).sort_values(["truth", "image_id"], ignore_index=True)


def _limits(name: str, interval: Interval, prefix: str = "") -> dict[str, float]:
    figures = {name: interval.value, f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    return {key: round(value, 4) for key, value in figures.items()}


def _bar(key: str, part: str, split: str) -> str:
    return f"{key}: {part}" if split == "test" else f"{key}: {part}, {split}"
