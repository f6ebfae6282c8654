"""Floors: what can be answered without a look at the lungs. A system must beat them to say much."""

import numpy as np
import pandas as pd

from chest.labels import LABELS

FLOORS = {"floor_modality": "modality", "floor_site": "site"}  # system: what it goes by


def commonest_class(labelled: pd.DataFrame, by: str) -> np.ndarray:
    """The share of each class in the training images with the same `by`, float64 (N, 3).

    `labelled` is the manifest with the column split; `by` is "site" or "modality". An image whose
    site has no training image gets the shares of its modality, and where that has none either
    those of all training images. The largest share is the floor's answer.
    """
    train = labelled[labelled["split"] == "train"]
    overall = pd.Series(_shares(train["label"]), LABELS)
    shares = pd.DataFrame(index=labelled.index, columns=list(LABELS), dtype=np.float64)
    for column in dict.fromkeys((by, "modality")):
        own = train.groupby(column)["label"].apply(_shares)
        found = labelled[column].map(own)
        known = found.notna() & shares[LABELS[0]].isna()
        if known.any():
            shares.loc[known] = np.stack(found[known])
    return shares.fillna(overall).to_numpy()


def _shares(labels: pd.Series) -> np.ndarray:
    return labels.value_counts(normalize=True).reindex(list(LABELS), fill_value=0.0).to_numpy()
