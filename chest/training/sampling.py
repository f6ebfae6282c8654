"""Class balance: sampling of the training images, or a loss adjusted for class frequencies."""

import numpy as np
import pandas as pd
import torch

from chest.core.labels import LABELS


def sampling_weights(table: pd.DataFrame, balance: str) -> np.ndarray | None:
    """Return the probability of drawing each row of the training `table`, float64 (n,).

    ``class`` makes the classes equally frequent, ``class_modality`` the classes of each modality
    (COVID-19 CT, normal CT, normal X-ray, tuberculosis X-ray). Returns None for other values of
    `balance`: every image is drawn once.
    """
    columns = {"class": ["label"], "class_modality": ["label", "modality"]}.get(balance)
    if columns is None:
        return None
    weights = 1 / table.groupby(columns)["label"].transform("size").to_numpy(np.float64)
    return weights / weights.sum()


def draw_epoch(
    images: int, weights: np.ndarray | None, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draw the batches of an epoch: numbers of training images, int64 of `shape` (steps, B).

    With `weights` images are drawn with replacement. Without, a random order of all images is cut,
    or repeated, to fill the batches.
    """
    if weights is None:
        return np.resize(rng.permutation(images), shape)
    return rng.choice(images, shape, p=weights)


def logit_adjustment(targets: np.ndarray, balance: str) -> torch.Tensor:
    """Return what to add to the logits, in the training loss only, float64 (3,).

    With ``logit_adjusted`` this is the logarithm of each class's share of the training images, so
    that the logits themselves minimise the balanced error (Menon et al. 2021, arXiv:2007.07314,
    tau = 1). A class without images counts as one image. Zeros for other values of `balance`.
    """
    if balance != "logit_adjusted":
        return torch.zeros(len(LABELS), dtype=torch.float64)
    counts = np.maximum(np.bincount(targets, minlength=len(LABELS)), 1)
    return torch.from_numpy(np.log(counts / counts.sum()))
