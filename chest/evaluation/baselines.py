"""Blind baselines: how far one gets without looking at the lungs. A system must beat them.

Rules know only where an image comes from. Their balanced form names the class with the largest
share n(group, class) / n(class), which maximises UAR; the commonest class of a group maximises
accuracy (WAR). The scanner model sees what a scanner and an archive leave behind, outside the lungs
alone. The linear model on 28 x 28 pixels is not blind: it stands for what needs no deep network.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from chest.core.labels import LABELS, MODALITIES
from chest.data.regions import visible_region
from chest.evaluation.predictions import Record

GRID = 28  # px of the pooled images
C_VALUES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the logistic regression; chosen on validation
NEWTON, FEW = "newton-cholesky", 1024  # solver, faster up to so many images or features
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)  # of the grey levels
CHUNK = 64  # images at a time


@dataclass(frozen=True)
class Rule:
    """A rule that goes by columns of the manifest; see the module."""

    name: str
    by: tuple[str, ...]
    balanced: bool


RULES = {
    "blind_modality": Rule("Blind: by modality (balanced)", ("modality",), True),
    "blind_site": Rule("Blind: by site (balanced)", ("modality", "site"), True),
    "blind_collection": Rule(
        "Blind: by collection and site (balanced)", ("modality", "collection", "site"), True
    ),
    "floor_modality": Rule("Floor: modality's commonest class", ("modality",), False),
    "floor_site": Rule("Floor: site's commonest class", ("modality", "site"), False),
    "floor_collection": Rule(
        "Floor: collection and site's commonest class", ("modality", "collection", "site"), False
    ),
}


def rule_probabilities(labelled: pd.DataFrame, rule: Rule) -> np.ndarray:
    """Return the probabilities that `rule` gives each image, float64, (N, 3).

    They are the shares of the training images in the image's group, in the balanced form each class
    divided by its number of training images first. A group without training images gets what its
    modality gets, and where that has none, what all images get.
    """
    train = labelled[labelled["split"] == "train"]
    totals = train["label"].value_counts().reindex(list(LABELS), fill_value=0)
    result = np.full((len(labelled), len(LABELS)), np.nan)
    for columns in (rule.by, ("modality",), ()):
        group, own = _groups(labelled, columns), _groups(train, columns)
        counts = pd.crosstab(own, train["label"]).reindex(columns=list(LABELS), fill_value=0)
        if rule.balanced:
            counts = counts / totals.clip(lower=1)
        shares = counts.div(counts.sum(axis=1), axis=0)
        found = shares.reindex(group).to_numpy()
        result = np.where(np.isnan(result), found, result)
    return result


def _groups(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.Series:
    """Name each row's group; without columns all rows are in one."""
    names = pd.Series("", table.index)
    for column in columns:
        names = names + "\n" + table[column]
    return names


@dataclass(frozen=True)
class Fitted:
    """Probabilities of a logistic regression for every image, (N, 3), and its C by modality."""

    probabilities: np.ndarray
    chosen_c: dict[str, float]

    def describe(self, features: Mapping = MappingProxyType({})) -> dict[str, object]:
        """Return the fields of a `predictions.Record` that say how the model was made.

        `features` says how its features were made; what is no field of a record becomes details.
        """
        details = {key: value for key, value in features.items() if key not in Record.model_fields}
        details |= {f"C_{modality}": c for modality, c in self.chosen_c.items()}
        versions = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
        own = {key: value for key, value in features.items() if key in Record.model_fields}
        return own | {"details": details, "versions": own.get("versions", {}) | versions}


def fit_linear(features: np.ndarray, labelled: pd.DataFrame) -> Fitted:
    """Fit a logistic regression per modality on the training images and answer all images.

    `features` is float, (N, K), one row per row of `labelled`. Which modality an image has is no
    secret, so each has a model of its own among the classes that occur in it. C is chosen on the
    modality's validation images.
    """
    splits, labels = labelled["split"].to_numpy(), labelled["label"].to_numpy()
    probabilities, chosen_c = np.full((len(labelled), len(LABELS)), 1 / len(LABELS)), {}
    for modality in MODALITIES:
        rows = np.flatnonzero(labelled["modality"] == modality)
        train, val = (rows[splits[rows] == split] for split in ("train", "val"))
        classes = np.unique(labels[train])
        if len(classes) == 1:
            probabilities[rows] = np.array(LABELS) == classes[0]
        if len(classes) < 2:
            continue
        scaler = StandardScaler().fit(features[train])
        scaled = [scaler.transform(features[part]) for part in (train, val, rows)]
        model = fit_logistic(scaled[0], labels[train], scaled[1], labels[val])
        chosen_c[modality] = model.C
        columns = [LABELS.index(label) for label in model.classes_]
        probabilities[rows] = 0
        probabilities[np.ix_(rows, columns)] = model.predict_proba(scaled[2])
    return Fitted(probabilities, chosen_c)


def fit_logistic(
    train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray
) -> LogisticRegression:
    """Fit a logistic regression on `train`, float (n, K), and choose C by UAR on `val`.

    The features should be standardised. All classes weigh the same. Of the C_VALUES that are
    equally good, the smallest is taken.
    """
    # The weights lie in the span of the images: with few images the problem is a small one.
    basis = np.linalg.qr(train.T)[0] if len(train) < train.shape[1] else None
    if basis is not None:
        train, val = train @ basis, val @ basis
    with warnings.catch_warnings():
        # Where no digit is left to improve, the line search finds nothing better.
        warnings.filterwarnings("ignore", "Line search of Newton", ConvergenceWarning)
        fits = _fits(train, labels)
        best = fits[int(np.argmax([_uar(fit, val, val_labels) for fit in fits]))]
        # Newton's method takes the last digits: the answers must not depend on the processor.
        best.set_params(solver=NEWTON).fit(train, labels)
    if basis is not None:
        best.coef_, best.n_features_in_ = best.coef_ @ basis.T, len(basis)
    return best


def _fits(features: np.ndarray, labels: np.ndarray) -> list[LogisticRegression]:
    """Fit one model per C, each starting from the one before."""
    solver = NEWTON if min(features.shape) <= FEW else "lbfgs"
    model = LogisticRegression(
        solver=solver, class_weight="balanced", tol=1e-8, max_iter=10_000, warm_start=True
    )
    return [copy.deepcopy(model.set_params(C=c).fit(features, labels)) for c in C_VALUES]


def _uar(fit: LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
    """Return the UAR as `classification_metrics` does, which takes longer than a small fit."""
    if not len(labels):
        return 0.0
    right = fit.predict(features) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def pool(images: np.ndarray, visible: np.ndarray | bool = True) -> np.ndarray:
    """Average the visible part of each image over GRID x GRID cells: float64, (N, 784).

    `images` is uint8, (N, side, side); `visible` is bool, (side, side), or True: everything. What
    is hidden counts as black. Cells are in row order, grey levels from 0 to 1.
    """
    side = images.shape[-1]
    cell = np.arange(side) * GRID // side
    member = (cell == np.arange(GRID)[:, None]).astype(np.float32)  # (GRID, side)
    area = 255.0 * np.outer(member.sum(axis=1), member.sum(axis=1))
    pooled = np.empty((len(images), GRID, GRID))
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        grey = images[part] * visible
        # Sums of whole numbers: exact in float32.
        pooled[part] = member @ grey.astype(np.float32) @ member.T / area
    return pooled.reshape(len(images), -1)


def scanner_features(images: np.ndarray, labelled: pd.DataFrame) -> np.ndarray:
    """Return what a scanner and an archive leave behind, float64, (N, K).

    Width, height and aspect of the file, and the border: its grey levels and its pooled pixels. No
    feature depends on a pixel inside it.
    """
    size = labelled[["width", "height"]].astype(float).to_numpy()
    aspect = size[:, :1] / size[:, 1:]
    border = visible_region("border", images.shape[-1])
    frame = pool(images, border)[:, visible_region("border", GRID).ravel()]
    grey = grey_statistics(images, border)
    return np.hstack([np.log(size), aspect, grey, frame])


def grey_statistics(images: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return mean, standard deviation, PERCENTILES, and shares of 0 and 255: float64, (N, 11).

    They are those of the pixels where `visible`, bool (side, side), is true.
    """
    levels = np.arange(256)
    rows = []
    for image in images:
        counts = np.bincount(image[visible], minlength=256)
        shares = counts / counts.sum()
        mean = shares @ levels
        spread = np.sqrt(shares @ (levels - mean) ** 2)
        # The lowest level with at least so many pixels at or below it.
        cuts = np.searchsorted(np.cumsum(counts), np.array(PERCENTILES) / 100 * counts.sum())
        rows.append([mean, spread, *cuts, shares[0], shares[255]])
    return np.array(rows, dtype=np.float64)
