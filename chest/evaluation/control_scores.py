"""Scores of the controls: what changes an answer, and does a result survive without its image?"""

import pandas as pd

from chest.core.labels import MODALITIES
from chest.evaluation.comparison import compare
from chest.evaluation.controls import ASKED
from chest.evaluation.intervals import intervals
from chest.evaluation.metrics import classification_metrics

BLIND = ("no_image", "other_image")


def score_controls(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Score each condition, on all images of a split and within each modality.

    `table` is as of `read_controls`. Columns: split, modality (``all`` too), condition, n, covered
    (mean), uar and changed (share of the answers that are not those of ``asked``). With and without
    the image also uar_low and uar_high, and gain with gain_low and gain_high: how much higher the
    UAR of ``asked`` is, with the paired 95 % interval.
    """
    rows = []
    for split, part in table.groupby("split", sort=True):
        for modality in ("all", *MODALITIES):
            chosen = part if modality == "all" else part[part["modality"] == modality]
            if len(chosen):
                rows += [
                    {"split": split, "modality": modality, **row} for row in _score(chosen, seed)
                ]
    return pd.DataFrame(rows)


def survives_without_image(scores: pd.DataFrame, split: str = "test") -> list[str]:
    """Return the modalities in which a system is no better than without its image.

    `scores` are those of `score_controls`; better is what the interval of the gain shows.
    """
    within = scores[(scores["split"] == split) & (scores["modality"] != "all")]
    blind = within[within["condition"].isin(BLIND)]
    return sorted(blind.loc[blind["gain_low"] <= 0, "modality"].unique())


def _score(table: pd.DataFrame, seed: int) -> list[dict]:
    """Score the conditions of one group of images."""
    conditions = {
        name: own.sort_values("image_id", ignore_index=True)
        for name, own in table.groupby("condition", sort=False)
    }
    reference = conditions[ASKED]
    rows = []
    for name, own in conditions.items():
        row = {
            "condition": name,
            "n": len(own),
            "covered": own["covered"].mean(),
            "uar": classification_metrics(own["actual"], own["predicted"])["uar"],
            "changed": (own["predicted"] != reference["predicted"]).mean(),
        }
        if name in (ASKED, *BLIND):  # the others need no interval, and a bootstrap takes time
            row |= intervals(own, seed).uar.as_dict("uar")
            row |= compare(own, reference, seed).uar.change.as_dict("gain")
        rows.append(row)
    return rows
