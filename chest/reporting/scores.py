"""All figures of a system on one split, and the tables that metrics files and plots are made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from chest.core.labels import EVALUATED, MODALITIES
from chest.core.parallel import parallel_map
from chest.evaluation.calibration import calibration_metrics
from chest.evaluation.control_scores import score_controls
from chest.evaluation.controls import ASKED, read_controls
from chest.evaluation.intervals import Interval, Intervals, intervals
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.patients import per_patient
from chest.evaluation.predictions import System
from chest.evaluation.roc import disease_scores, operating_points, roc_metrics, thresholds
from chest.evaluation.subgroups import Group, score_all, score_groups

BINS = 20  # of the histograms of scores
CONTROL_COLUMNS = [
    *("system", "split", "modality", "condition", "n", "covered", "changed"),
    *("uar", "uar_low", "uar_high", "gain", "gain_low", "gain_high"),
]


@dataclass(frozen=True)
class Scores:
    """Figures of one system on one split.

    ``whole``: its answers, and the figures over all of them; ``headline``: the same as metrics.
    ``groups``: within modality, site and so on. ``points``: see `operating_points`; empty if the
    system did not answer the validation split. ``ranking``: `roc_metrics`, `calibration_metrics`
    and, by modality and target, ``points``. ``patients``: what `headline` and `roc_metrics` give
    for the mean answer per patient.
    """

    whole: Group
    headline: dict
    groups: list[Group]
    points: list[dict]
    ranking: dict
    patients: dict

    @property
    def answers(self) -> pd.DataFrame:
        return self.whole.rows


ScoresBySystem = dict[str, dict[str, Scores]]  # {system: {split: figures}}


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
    whole, patients = score_all(answers, seed), per_patient(answers)
    points = operating_points(answers, cuts, seed)
    ranking = roc_metrics(answers, seed) | calibration_metrics(answers, seed)
    return Scores(
        whole=whole,
        headline=headline(answers, whole.found),
        groups=score_groups(answers, seed, severity),
        points=points,
        ranking=ranking | ({"points": _nest_points(points)} if points else {}),
        patients=headline(patients, intervals(patients, seed)) | roc_metrics(patients, seed),
    )


def headline(answers: pd.DataFrame, found: Intervals) -> dict:
    """Return `classification_metrics` with the limits of the 95 % intervals beside the values.

    ``uar_low`` and ``uar_high`` stand beside ``uar``; ``recall_low`` and ``recall_high`` hold the
    limits of each class.
    """
    metrics = classification_metrics(answers["actual"], answers["predicted"])
    return {
        **found.uar.as_dict("uar"),
        **found.war.as_dict("war"),
        "recall": metrics["recall"],
        "recall_low": {label: found.recall[label].low for label in metrics["recall"]},
        "recall_high": {label: found.recall[label].high for label in metrics["recall"]},
        **{key: x for key, x in metrics.items() if key not in ("uar", "war", "recall")},
    }


def _nest_points(points: list[dict]) -> dict:
    """Return {modality: {target: {threshold, sensitivity, sensitivity_low, …, best}}}."""
    nested: dict = {}
    for row in points:
        figures = {key: x for key, x in row.items() if key not in ("modality", "target")}
        nested.setdefault(row["modality"], {})[row["target"]] = figures
    return nested


def uar_table(column: str, scores: ScoresBySystem) -> pd.DataFrame:
    """Return ``plots/uar.csv`` or ``plots/probes.csv``: all images, then each modality.

    `column` is the name of the first column, which holds the key. A modality with images of one
    class has no row. ``bar`` names a row: `dvc plots` compares revisions by it.
    """
    return pd.DataFrame(
        {
            **{column: key, "split": split, "within": group.key},
            **_figures("uar", group.found.uar),
            **{"n": len(group.rows), "bar": _bar(key, group.key, split)},
        }
        for key, by_split in scores.items()
        for split, own in by_split.items()
        for group in [own.whole, *own.groups]
        if group.kind == "all" or (group.kind == "modality" and group.several_classes)
    )


def transfer_table(across: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``plots/probes.csv`` for models of one site; see `probes.score_across`.

    ``within`` names the sites; AUROC and its limits stand beside the columns of `uar_table`.
    """
    sites = across["trained_on"] + " to " + across["tested_on"]
    columns = {"region": "probe", "uar_low": "low", "uar_high": "high"}
    table = across.rename(columns=columns).assign(split="across", within=sites)
    table["bar"] = table["probe"] + ": " + sites
    order = ["probe", "split", "within", "uar", "low", "high", "n", "bar"]
    return table[[*order, "auroc", "auroc_low", "auroc_high"]]


def recall_table(scores: ScoresBySystem) -> pd.DataFrame:
    """Return ``plots/recall.csv``: a row per system, split and class; see `uar_table`."""
    return pd.DataFrame(
        {
            **{"system": key, "split": split, "class": label},
            **_figures("recall", interval),
            **{"n": int((own.answers["actual"] == label).sum()), "bar": _bar(key, label, split)},
        }
        for key, by_split in scores.items()
        for split, own in by_split.items()
        for label, interval in own.whole.found.recall.items()
    )


def nest_uars(uars: pd.DataFrame) -> dict:
    """Return {probe: {uar, uar_low, uar_high, uar_ct, …, external: …}} of ``plots/probes.csv``."""
    nested: dict = {}
    for row in uars.to_dict("records"):
        figures = nested.setdefault(row["probe"], {})
        if row["split"] == "external":
            figures = figures.setdefault("external", {})
        name = "uar" if row["within"] == "all" else f"uar_{row['within']}"
        figures |= Interval(row["uar"], row["low"], row["high"]).as_dict(name)
    return nested


def control_table(systems: Iterable[str], labelled: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return ``plots/controls.csv``: `score_controls` of each of `systems` that has controls.

    Beside its columns: ``system``, and ``bar`` as in `uar_table`. No rows if no system has any.
    """
    read = {key: read_controls(key, labelled) for key in systems}
    read = {key: own[own["split"].isin(EVALUATED)] for key, own in read.items() if own is not None}
    scored = parallel_map(partial(score_controls, seed=seed), [*read.values()])
    tables = [own.assign(system=key) for key, own in zip(read, scored, strict=True)]
    table = pd.concat(tables) if tables else pd.DataFrame()
    table = table.reindex(columns=CONTROL_COLUMNS).round(4).reset_index(drop=True)
    bars = [
        _bar(row.system, f"{row.condition}, {row.modality}", row.split)
        for row in table.itertuples()
    ]
    return table.assign(bar=bars)


def nest_controls(controls: pd.DataFrame) -> dict:
    """Return {system: {modality: {covered, condition: figures}}} of `control_table`.

    Those of external sites stand under ``external`` of the system.
    """
    nested: dict = {}
    for row in controls.to_dict("records"):
        place = nested.setdefault(row["system"], {})
        if row["split"] == "external":
            place = place.setdefault("external", {})
        place = place.setdefault(row["modality"], {})
        if row["condition"] == ASKED:
            place["covered"] = row["covered"]
        figures = [key for key in row if key.startswith(("uar", "changed", "gain"))]
        place[row["condition"]] = {key: row[key] for key in figures if pd.notna(row[key])}
    return nested


def layer_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Return ``plots/layers.csv``: `read_layers` with ``bar``, as in `uar_table`."""
    return layers.assign(bar=layers["system"] + ": " + layers["layer"] + ", " + layers["modality"])


def nest_layers(layers: pd.DataFrame) -> dict:
    """Return {system: {layer: {uar, uar_low, uar_high, uar_ct, …}}} of `read_layers`."""
    nested: dict = {}
    for row in layers.to_dict("records"):
        figures = nested.setdefault(row["system"], {}).setdefault(row["layer"], {})
        name = "uar" if row["modality"] == "all" else f"uar_{row['modality']}"
        figures |= Interval(row["uar"], row["uar_low"], row["uar_high"]).as_dict(name)
    return nested


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
    records = wrong.to_dict("records")
    truth = [row[row["actual"]] for row in records]
    probability = [row.get(row["predicted"], np.nan) for row in records]
    wrong = wrong.assign(truth=truth, probability=probability)
    return wrong.sort_values(["truth", "image_id"], ignore_index=True)


def _figures(name: str, interval: Interval) -> dict[str, float]:
    figures = {name: interval.value, "low": interval.low, "high": interval.high}
    return {key: round(value, 4) for key, value in figures.items()}


def _bar(key: str, part: str, split: str) -> str:
    return f"{key}: {part}" if split == "test" else f"{key}: {part}, {split}"
