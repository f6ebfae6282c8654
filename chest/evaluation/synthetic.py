"""Synthetic images: which are copies of training images, and how they are distributed.

Memorisation. The nearest real images are found by perceptual hash and by frozen features. A copy is
much nearer to one training image than to any other patient's: the ``ratio`` of the two distances is
low. How low is too low, real images tell: ``percentile`` is the percentage of the class's training
images whose ratio to other patients' images is lower still. Of images that were drawn from the same
distribution, five in a hundred have a percentile below 5.

Why the ratio and 5: of 100 real films at 128 px, turned by up to 3 degrees and moved by up to 2 %,
it found 85, the distance alone 70, and the hash 6; of 70 films of other patients it took 3 for
copies. Of films turned by up to 10 degrees and moved by 5 % it found 30; then `membership_test`
tells that there are copies, though not which.

Quality. Images are held against the validation images of their class by KID (Bińkowski et al. 2018,
arXiv:1801.01401), precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), and a linear
probe that tells them apart. As many training images in their place give the floor. The libraries
that have these measures need torchvision or trained Inception weights.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.spatial.distance import cdist
from scipy.stats import percentileofscore
from sklearn.metrics import pairwise_distances_chunked, roc_auc_score
from sklearn.preprocessing import StandardScaler

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY
from chest.core.params import Count, Section
from chest.data.synthetic import AUDIT_COLUMNS
from chest.evaluation.baselines import fit_logistic

FIGURES = Path("data/synthetic_audit.json")

BITS = 256  # of a perceptual hash
PLACES = 4  # of distances, so that they are the same on all processors
DRAWS = 10_000  # of the permutation test
SUBSETS, SUBSET = 100, 100  # of KID: their number, and images in each at most
NEIGHBOURS = 3  # of the manifolds of precision and recall
FOLDS = 5  # of the probe
SMALLEST = 10  # images on each side that quality is measured of


@dataclass(frozen=True)
class Described:
    """Images in numbers: a row of each of ``table``, ``features`` and ``hashes`` for each.

    ``table`` has label and modality, of real images also image_id, patient_id and split, of
    synthetic ones synthetic_id and method. ``features``: float64 (n, d); ``hashes``: uint64 (n, 4)
    of `audit.perceptual_hashes`.
    """

    table: pd.DataFrame
    features: np.ndarray
    hashes: np.ndarray

    def where(self, **values: str) -> "Described":
        """Return the images whose columns have these values."""
        chosen = np.logical_and.reduce([self.table[key] == x for key, x in values.items()])
        return self.take(np.flatnonzero(chosen))

    def take(self, rows: np.ndarray) -> "Described":
        """Return the images of `rows`, int64 (n,)."""
        table = self.table.iloc[rows].reset_index(drop=True)
        return Described(table, self.features[rows], self.hashes[rows])

    @property
    def bits(self) -> np.ndarray:
        """The hashes as zeros and ones, (n, BITS)."""
        return np.unpackbits(self.hashes.view(np.uint8), axis=1)


class Limits(Section):
    """What counts as a near-copy: so many bits of the hash, or a percentile below this one."""

    hash_bits: Count
    percentile: Annotated[float, Field(ge=0, le=100)]


def standardize(real: Described, made: Described) -> tuple[Described, Described]:
    """Return both with features of mean 0 and, on average, variance 1 in the training images.

    All features are divided by the same number: a feature that hardly varies among real images
    would be all that counts in others.
    """
    train = real.where(split="train").features
    mean, scale = train.mean(axis=0), np.sqrt(train.var(axis=0).mean())
    return tuple(replace(x, features=(x.features - mean) / scale) for x in (real, made))


# --- Memorisation ----------------------------------------------------------------------------


def find_copies(real: Described, made: Described, limits: Limits) -> pd.DataFrame:
    """Return what is nearest to each synthetic image, and whether it is a near-copy: AUDIT_COLUMNS.

    `real` holds training and test images of each modality in `made`. Near-copies of a diffusion
    model are ``dropped``; the other methods make copies on purpose.
    """
    kinds = made.table[["modality", "label"]].drop_duplicates().itertuples(index=False)
    found = pd.concat(
        _nearest_real(
            real.where(modality=modality), made.where(modality=modality, label=label), label
        )
        for modality, label in kinds
    )
    near = (found["bits"] <= limits.hash_bits) | (found["percentile"] < limits.percentile)
    found = found.assign(near_copy=near, dropped=near & (found["method"] == "diffusion"))
    return made.table[["synthetic_id"]].merge(found)[list(AUDIT_COLUMNS)]


def _nearest_real(real: Described, made: Described, label: str) -> pd.DataFrame:
    """Return the table of `made`, of one class, with the nearest of `real`, of its modality."""
    train, test = real.where(split="train"), real.where(split="test")
    patients, own = train.table["patient_id"].to_numpy(), train.where(label=label)
    by_hash, bits, _ = nearest(made.bits, train.bits, patients, metric="hamming")
    row, distance, second = nearest(made.features, train.features, patients)
    test_patients = test.table["patient_id"].to_numpy()
    test_row, test_distance, _ = nearest(made.features, test.features, test_patients)
    own_patients = own.table["patient_id"].to_numpy()
    _, *usual = nearest(own.features, train.features, patients, own_patients)
    ratio = _ratio(distance, second)
    return made.table.assign(
        hash_nearest=train.table["image_id"].to_numpy()[by_hash],
        bits=(BITS * bits).round().astype(int),
        nearest=train.table["image_id"].to_numpy()[row],
        distance=distance,
        ratio=ratio,
        percentile=percentileofscore(_ratio(*usual), ratio, kind="strict").round(2),
        test_nearest=test.table["image_id"].to_numpy()[test_row],
        test_distance=test_distance,
    )


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return how near the nearest image is beside the next patient's; 0 of exact copies."""
    return (first / np.maximum(second, 10.0**-PLACES)).round(PLACES)


def nearest(
    queries: np.ndarray,
    points: np.ndarray,
    patients: np.ndarray,
    own: np.ndarray | None = None,
    metric: str = "euclidean",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each of `queries` (n, d) the nearest row of `points` (m, d), and how far it is.

    The third array is the distance to the nearest point of another patient; `patients` (m,) are
    those of the points. With `own`, (n,), points of a query's own patient do not count.
    """

    def reduce(distances: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        distances = distances.round(PLACES)
        if own is not None:
            distances[own[start : start + len(distances), None] == patients] = np.inf
        rows, first = distances.argmin(axis=1), distances.min(axis=1)
        distances[patients[rows, None] == patients] = np.inf
        return rows, first, distances.min(axis=1)

    parts = pairwise_distances_chunked(queries, points, reduce_func=reduce, metric=metric)
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def membership_test(found: pd.DataFrame, real: pd.DataFrame, seed: int) -> dict[str, float]:
    """Test whether the nearest real image is a test image as often as chance has it.

    `found` are rows of `find_copies` of one modality, `real` the real images of it. Chance: which
    patients of each class are in test is drawn anew. ``p_test``: of as many test images or more,
    which says that the generator saw test images; ``p_train``: of as few, that it copies.
    """
    real = real[real["split"].isin(("train", "test"))]
    in_test = found["test_distance"] < found["distance"]
    image = found["nearest"].mask(in_test, found["test_nearest"])
    patients = real.drop_duplicates("patient_id").set_index("patient_id")
    counts = image.map(real.set_index("image_id")["patient_id"]).value_counts()
    rng, drawn = np.random.default_rng(seed), np.zeros(DRAWS)
    for _, own in patients.groupby("label"):
        members = np.tile(own["split"] == "test", (DRAWS, 1))
        drawn += rng.permuted(members, axis=1) @ counts.reindex(own.index, fill_value=0).to_numpy()
    seen = in_test.sum()
    return {
        "nearest_is_test": float(in_test.mean()),
        "by_chance": float(drawn.mean() / len(found)),
        "p_test": float((1 + (drawn >= seen).sum()) / (1 + DRAWS)),
        "p_train": float((1 + (drawn <= seen).sum()) / (1 + DRAWS)),
    }


# --- Quality ---------------------------------------------------------------------------------


def quality(real: np.ndarray, made: np.ndarray, groups: tuple, seed: int) -> dict[str, float]:
    """Compare features `made` (m, d) with those of held-out images, `real` (n, d).

    `groups` of both, (n,) and (m,), say which images the probe must not have on both sides of a
    fold: of one patient, or copies of one image.
    """
    distance, spread = kid(real, made, seed)
    precision, recall = precision_recall(real, made)
    figures = {"kid": distance, "kid_sd": spread, "precision": precision, "recall": recall}
    return figures | {"probe_auroc": probe_auroc(real, made, groups, seed)}


def kid(real: np.ndarray, made: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the mean and standard deviation of the squared MMD over random subsets.

    A subset holds SUBSET images of each, or half of the fewer ones.
    """
    rng = np.random.default_rng(seed)
    size = min(SUBSET, len(real) // 2, len(made) // 2)
    values = [
        squared_mmd(*(x[rng.choice(len(x), size, replace=False)] for x in (real, made)))
        for _ in range(SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased squared MMD of `x` (n, d) and `y` (m, d), kernel (x·y / d + 1) ** 3."""

    def within(a: np.ndarray) -> float:
        kernel = (a @ a.T / a.shape[1] + 1) ** 3
        return (kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean())


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Return the share of `made` on the manifold of `real`, and of `real` on that of `made`.

    A manifold: balls around the images, each as wide as the way to its third neighbour.
    """
    between = cdist(real, made)
    balls = (np.sort(cdist(x, x), axis=1)[:, NEIGHBOURS] for x in (real, made))
    of_real, of_made = balls
    precision = (between <= of_real[:, None]).any(axis=0).mean()
    return float(precision), float((between <= of_made).any(axis=1).mean())


def probe_auroc(real: np.ndarray, made: np.ndarray, groups: tuple, seed: int) -> float:
    """Return the AUROC of a logistic regression that tells the two apart: mean of FOLDS folds.

    C is chosen on the fold after the tested one.
    """
    rng = np.random.default_rng(seed)
    features = StandardScaler().fit_transform(np.concatenate([real, made]))
    labels = np.repeat([0, 1], [len(real), len(made)])
    folds = np.concatenate([_folds(own, rng) for own in groups])
    aurocs = []
    for fold in range(FOLDS):
        test, val = folds == fold, folds == (fold + 1) % FOLDS
        train = ~(test | val)
        model = fit_logistic(features[train], labels[train], features[val], labels[val])
        aurocs.append(roc_auc_score(labels[test], model.decision_function(features[test])))
    return float(np.mean(aurocs))


def _folds(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deal the groups out to FOLDS folds, as many to each; return the fold of each image."""
    names, group = np.unique(groups, return_inverse=True)
    return rng.permutation(np.arange(len(names)) % FOLDS)[group]


# --- Figures ---------------------------------------------------------------------------------


def read_figures() -> dict:
    """Read the figures of `audit_figures`; raises InputError if they are missing."""
    try:
        return json.loads(FIGURES.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        expected = "the figures of the synthetic images"
        raise InputError([Problem(FIGURES, str(error), expected, REMEDY)]) from None


def audit_figures(
    real: Described, made: Described, found: pd.DataFrame, limits: Limits, seed: int
) -> dict:
    """Return {"n": count, method: {"<label>_<modality>": figures}} of `found` by `find_copies`.

    Counts are of all images, quality of those that are not dropped. Quality is left out where
    fewer than SMALLEST images, or FOLDS patients, are on a side.
    """
    figures: dict = {"n": len(found)}
    for (method, label, modality), own in found.groupby(["method", "label", "modality"]):
        known = real.where(modality=modality)
        counts = {
            "n": len(own),
            "near_by_hash": int((own["bits"] <= limits.hash_bits).sum()),
            "near_by_features": int((own["percentile"] < limits.percentile).sum()),
            "near_copies": int(own["near_copy"].sum()),
            "dropped": int(own["dropped"].sum()),
            "median_percentile": float(own["percentile"].median()),
        }
        kept = own.index[~own["dropped"]]
        source = found["nearest"][kept].map(known.table.set_index("image_id")["patient_id"])
        figures.setdefault(method, {})[f"{label}_{modality}"] = (
            counts
            | membership_test(own, known.table, seed)
            | _against_held_out(known.where(label=label), made.take(kept), source.to_numpy(), seed)
        )
    return figures


def _against_held_out(real: Described, made: Described, source: np.ndarray, seed: int) -> dict:
    """Return the quality of synthetic images and, as ``floor``, of as many training images.

    `real` are those of the class; `source` is the patient that each synthetic image is nearest to.
    """
    held_out, train = real.where(split="val"), real.where(split="train")
    rng, n = np.random.default_rng(seed), min(len(made.table), len(train.table))
    sides = [(held_out.features, held_out.table["patient_id"].to_numpy())]
    for candidates, groups in ((made, source), (train, train.table["patient_id"].to_numpy())):
        drawn = rng.choice(len(candidates.table), n, replace=False)
        sides.append((candidates.features[drawn], groups[drawn]))
    if any(len(x) < SMALLEST or len({*groups}) < FOLDS for x, groups in sides):
        return {}
    (reference, patients), *others = sides
    own, floor = (quality(reference, x, (patients, groups), seed) for x, groups in others)
    return {"held_out": len(reference), "compared": n, **own, "floor": floor}
