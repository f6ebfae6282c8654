"""The figures of one system, as metrics files nest them and as plots tabulate them."""

import pandas as pd

from chest.calibration import calibration_metrics
from chest.intervals import Interval, Intervals
from chest.labels import LABELS
from chest.metrics import classification_metrics
from chest.ranking import ranking_metrics
from chest.within import Group

ALL = "all"  # images of both modalities, all three classes


def headline(table: pd.DataFrame, found: Intervals) -> dict:
    """`classification_metrics` of a system with the limits of the 95 % intervals beside the values.

    ``uar_low`` and ``uar_high`` stand beside ``uar``, ``recall_low`` and ``recall_high`` hold the
    limits for each class. `table` has actual and predicted.
    """
    metrics = classification_metrics(table["actual"], table["predicted"])
    uar, war = metrics.pop("uar"), metrics.pop("war")
    recall = metrics.pop("recall")
    return {
        "uar": uar, "uar_low": found.uar.low, "uar_high": found.uar.high,
        "war": war, "war_low": found.war.low, "war_high": found.war.high,
        "recall": recall,
        "recall_low": {label: found.recall[label].low for label in recall},
        "recall_high": {label: found.recall[label].high for label in recall},
        **metrics,
    }  # fmt: skip


def ranking(table: pd.DataFrame) -> dict:
    """Ranking and calibration of a system: `ranking_metrics` and `calibration_metrics`."""
    probabilities = table[list(LABELS)].to_numpy()
    predicted, actual = table["predicted"].to_numpy(), table["actual"].to_numpy()
    return {**ranking_metrics(table), **calibration_metrics(probabilities, predicted, actual)}


def recall_rows(system: str, table: pd.DataFrame, found: Intervals) -> list[dict]:
    """Rows of ``plots/recall.csv``: a class each, its recall with limits and number of images.

    ``bar`` names both: in `dvc plots` a bar has one name, the same in every revision.
    """
    return [
        {
            "system": system,
            "class": label,
            **_limits("recall", interval),
            "n": int((table["actual"] == label).sum()),
            "bar": f"{system}: {label}",
        }
        for label, interval in found.recall.items()
    ]


def uar_rows(
    name: str, value: str, table: pd.DataFrame, found: Intervals, modalities: list[Group]
) -> list[dict]:
    """Rows of ``plots/uar.csv`` and ``plots/probes.csv``: UAR over all images and by modality.

    `name` is the column that says whose it is (system or probe), `value` what it holds;
    `modalities` are those of `score_modalities`. One of which all images are of one class has no
    row.
    """
    scored = [(ALL, table, found)]
    scored += [(g.key, g.rows, g.found) for g in modalities if g.found]
    return [
        {
            name: value,
            "within": within,
            **_limits("uar", figures.uar),
            "n": len(rows),
            "bar": f"{value}: {within}",
        }
        for within, rows, figures in scored
    ]


def _limits(name: str, interval: Interval) -> dict[str, float]:
    limits = {name: interval.value, "low": interval.low, "high": interval.high}
    return {key: round(value, 4) for key, value in limits.items()}
