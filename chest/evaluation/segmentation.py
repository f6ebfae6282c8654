"""How good the lung masks are, and for whom the gate that accepts them fails.

A gate that fails more often for one class tells the class: it is a shortcut itself.
"""

import pandas as pd

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table
from chest.core.labels import EVALUATED
from chest.data.masks import MASK_COLUMNS, MASK_INDEX


def read_mask_index(labelled: pd.DataFrame) -> pd.DataFrame:
    """Return `labelled` with ``accepted``, bool, and ``dice``, NaN without a published mask.

    Raises InputError if the file is missing or is not of these images.
    """
    table = read_table(MASK_INDEX, MASK_COLUMNS)
    if list(table["image_id"]) != list(labelled["image_id"]):
        expected = f"the {len(labelled)} images of data/manifest.csv"
        raise InputError([Problem(MASK_INDEX, "other images", expected, REMEDY)])
    accepted = (table["accepted"] == "True").to_numpy()
    dice = pd.to_numeric(table["dice"], errors="coerce").to_numpy()
    return labelled.assign(accepted=accepted, dice=dice)


def mask_metrics(masks: pd.DataFrame) -> dict:
    """Return accepted masks and their Dice by modality, then within it by site, label, and both.

    {modality: {images, accepted, dice, dice_p5, label: {label: {…}}, site: {site: {…, label: …}}}}.
    ``accepted`` is a share of all images; ``dice`` (mean) and ``dice_p5`` (5th percentile) are of
    test and external images with a published mask: training images taught the network.
    """
    return {
        modality: _by_label(own) | {"site": {x: _by_label(rows) for x, rows in own.groupby("site")}}
        for modality, own in masks.groupby("modality")
    }


def _by_label(rows: pd.DataFrame) -> dict:
    return _figures(rows) | {"label": {x: _figures(own) for x, own in rows.groupby("label")}}


def _figures(rows: pd.DataFrame) -> dict:
    figures = {"images": len(rows), "accepted": float(rows["accepted"].mean())}
    dice = rows.loc[rows["split"].isin(EVALUATED), "dice"].dropna()
    if len(dice):
        figures |= {"dice": float(dice.mean()), "dice_p5": float(dice.quantile(0.05))}
    return figures
