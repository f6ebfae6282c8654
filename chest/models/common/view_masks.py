"""The lung masks that a view needs, of all images of the study."""

import numpy as np
import pandas as pd

from chest.core.files import read_table
from chest.data.masks import MASK_COLUMNS, MASK_INDEX, read_masks, read_published_masks
from chest.models.common.views import View


def read_view_masks(
    table: pd.DataFrame, side: int, view: View, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the packed masks that `view` needs, or None, and which images are to be used.

    `table` is the manifest. The masks are uint8 (N, side, ceil(side / 8)), a row each; the images
    bool, (N,). A rejected mask is replaced by the whole image.
    """
    used = np.ones(len(table), bool)
    if not view.needs_masks:
        return None, used
    masks = np.array(read_masks(len(table), side))
    accepted = (read_table(MASK_INDEX, MASK_COLUMNS)["accepted"] == "True").to_numpy(copy=True)
    if view.masks == "true":
        rows, published = read_published_masks(table, side)
        masks[rows], accepted[rows] = published, True
    masks[~accepted] = 255
    if view.masks == "shuffled":
        masks = masks[another_patient(table, seed)]
    return masks, accepted if view.rejected == "unanswered" else used


def another_patient(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Return for each row of `table` a row of another patient of its modality, int64 (N,).

    Patients are put into a random circle, and each gets the images of the next one. A modality of
    one patient keeps its own.
    """
    rng, rows = np.random.default_rng(seed), np.arange(len(table))
    chosen = rows.copy()
    for _, part in table.reset_index(drop=True).groupby("modality"):
        images = part.groupby("patient_id").indices
        circle = rng.permutation(sorted(images))
        for patient, following in zip(circle, np.roll(circle, -1), strict=True):
            own, other = (part.index[images[name]] for name in (patient, following))
            chosen[own] = np.resize(other, len(own))
    return chosen
