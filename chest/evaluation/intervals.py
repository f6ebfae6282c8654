"""95 % confidence intervals from a bootstrap over patients.

Images of one patient are alike, so an interval that treats them as independent is too narrow.
Patients are drawn with replacement, with all of their images: the cluster bootstrap (Field and
Welsh, "Bootstrapping clustered data", J. R. Stat. Soc. B 69, 2007, 369-390), with percentiles as
limits. A patient's stratum is the set of classes that the patient's images have, nearly always one;
each draw takes as many patients of a stratum as there are, so every draw has images of every class.

**Where drawing changes nothing.** If a class was answered all right or all wrong, its recall is the
same in every draw, and an interval of no width would claim a certainty that ten patients cannot
give. There, recalls are drawn from the posterior under Jeffreys' prior, Beta(n r + 1/2,
n (1 - r) + 1/2), with r the recall and n the number of patients (Brown, Cai and DasGupta,
"Interval estimation for a binomial proportion", Stat. Sci. 16, 2001, 101-133). UAR and WAR are
computed from these draws too.

**A constant answer** is certain: a system that gives the same answer to every image of a modality
has recalls of exactly 1 and 0 there, whatever the patients.

With few patients the limits are somewhat too close; ``tests/evaluation/test_intervals.py`` and
``make soak`` measure the coverage on simulated cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

LEVEL = 0.95
DRAWS = 2000
CHUNK = 100_000  # patients times draws at a time


@dataclass(frozen=True)
class Interval:
    """A figure with the limits of its interval: low <= value <= high."""

    value: float
    low: float
    high: float

    def as_dict(self, name: str) -> dict[str, float]:
        """Return {name: value, name_low: low, name_high: high}, as metrics files have them."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Intervals:
    """UAR, WAR and the recall of each class that occurs, each with its interval."""

    uar: Interval
    war: Interval
    recall: dict[str, Interval]


class Bootstrap:
    """Patients drawn with replacement. The same images, seed and `draws` give the same draws.

    `patients` and `labels` are the patient and the class of each image; the order of the images
    does not matter. Attributes, for N images of P patients and C classes:

    ``classes``  classes that occur, sorted
    ``patient``  index of each image's patient, int64, (N,)
    ``label``    index of each image's class in ``classes``, int64, (N,)
    ``images``   images per patient and class, int64, (P, C)
    """

    def __init__(self, patients: Sequence, labels: Sequence, seed: int, draws: int = DRAWS):
        self.seed, self.draws = seed, draws
        self.patient, names = pd.factorize(np.asarray(patients), sort=True)
        self.label, classes = pd.factorize(np.asarray(labels), sort=True)
        self.classes = tuple(classes)
        self._shape = len(names), len(classes)
        self.images = self.count(np.ones(len(self.label), bool))
        stratum = (self.images > 0) @ (1 << np.arange(len(classes)))  # a bit per class
        self.strata = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]

    @property
    def patients(self) -> np.ndarray:
        """Number of patients with images of each class, int64, (C,)."""
        return (self.images > 0).sum(axis=0)

    def count(self, which: np.ndarray) -> np.ndarray:
        """Count the images in `which`, bool (N,), per patient and class: int64, (P, C)."""
        cells = self.patient[which] * self._shape[1] + self.label[which]
        return np.bincount(cells, minlength=self._shape[0] * self._shape[1]).reshape(self._shape)

    def posterior(self) -> np.random.Generator:
        """Return the generator for posterior draws; its stream is not that of the patients."""
        return np.random.default_rng([self.seed, 1])

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each patient is in each draw: uint16, (draws, P)."""
        weights = np.zeros((self.draws, self._shape[0]), np.uint16)
        generators = np.random.default_rng(self.seed).spawn(len(self.strata))
        for members, rng in zip(self.strata, generators, strict=True):
            step = max(1, CHUNK // len(members))
            for start in range(0, self.draws, step):
                block = weights[start : start + step]
                block[:, members] = _times_drawn(rng, len(members), len(block))
        return weights

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum `values`, (P, K), over the patients of each draw: float64, (draws, K).

        Sums of whole numbers are exact, hence the same on every machine.
        """
        step = max(1, CHUNK // self._shape[0])
        parts = [self.weights[k : k + step] for k in range(0, self.draws, step)]
        return np.concatenate([part.astype(np.float64) @ values for part in parts])

    def image_sums(self, values: np.ndarray) -> np.ndarray:
        """Sum `values` of the images, (N, K), over each draw: float64, (draws, K)."""
        per_patient = np.zeros((self._shape[0], values.shape[1]))
        np.add.at(per_patient, self.patient, values)
        return self.sums(per_patient)


def intervals(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> Intervals:
    """Return UAR, WAR and recalls of one system's answers with their 95 % intervals.

    `table` has one row per image: actual and predicted (as `classification_metrics` takes them),
    patient_id and, if there is more than one, modality. The values are those of
    `classification_metrics`.
    """
    bootstrap = Bootstrap(table["patient_id"], table["actual"], seed, draws)
    right = (table["actual"] == table["predicted"]).to_numpy()
    drawn, images = recall_draws(bootstrap, right, constant_classes(table, bootstrap.classes))
    return summarize(bootstrap, right, drawn, images)


def summarize(
    bootstrap: Bootstrap, right: np.ndarray, drawn: np.ndarray, images: np.ndarray
) -> Intervals:
    """Return the intervals of answers of which `right`, (N,), are right.

    `right` may be a share, of several runs; `drawn` are the recalls and `images` the images in each
    draw, (draws, C).
    """
    uar, war = uar_and_war(drawn, images)
    own = recalls(bootstrap, right)
    return Intervals(
        uar=share_interval(float(own.mean()), uar),
        war=share_interval(float(right.mean()), war),
        recall={
            label: share_interval(float(own[k]), drawn[:, k])
            for k, label in enumerate(bootstrap.classes)
        },
    )


def recalls(bootstrap: Bootstrap, right: np.ndarray) -> np.ndarray:
    """Return the recall of each class, (C,), of answers of which `right`, (N,), are right."""
    return np.bincount(bootstrap.label, right) / bootstrap.images.sum(axis=0)


def recall_draws(
    bootstrap: Bootstrap, right: np.ndarray, constant: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the recall of each class, and the images behind it: float64, (draws, C) each.

    `right`, bool (N,), says which images were answered right; `constant`, bool (C,), which classes
    got a constant answer and so have a certain recall.
    """
    rights = bootstrap.count(right)
    images = bootstrap.sums(bootstrap.images)
    drawn = bootstrap.sums(rights) / images
    rng = bootstrap.posterior()
    for k in np.flatnonzero(constant_across_draws(bootstrap, rights) & ~constant):
        n, share = bootstrap.patients[k], rights[:, k].sum() / bootstrap.images[:, k].sum()
        drawn[:, k] = rng.beta(n * share + 0.5, n * (1 - share) + 0.5, bootstrap.draws)
    return drawn, images


def constant_classes(table: pd.DataFrame, classes: tuple[str, ...]) -> np.ndarray:
    """Return which `classes` lie in modalities that got one and the same answer: bool, (C,).

    A modality with images of one class shows nothing: a perfect system is constant there as well.
    """
    modality = table["modality"] if "modality" in table else pd.Series("", table.index)
    counts = table.groupby(modality)[["actual", "predicted"]].nunique()
    constant = modality.map((counts["predicted"] == 1) & (counts["actual"] > 1))
    return np.array([constant[table["actual"] == label].all() for label in classes])


def constant_across_draws(bootstrap: Bootstrap, counts: np.ndarray) -> np.ndarray:
    """Return the classes whose ratio of `counts`, int64 (P, C), to images is the same in all draws.

    So it is if the patients' surplus (counts minus ratio times images) is equal within each
    stratum: any draw then has the surplus of the whole, which is 0. Returns bool, (C,).
    """
    images = bootstrap.images
    surplus = counts * images.sum(axis=0) - images * counts.sum(axis=0)  # times all images
    return np.all([np.ptp(surplus[members], axis=0) == 0 for members in bootstrap.strata], axis=0)


def uar_and_war(drawn: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return UAR and WAR, (draws,), of drawn recalls and numbers of images, (draws, C)."""
    return drawn.mean(axis=1), (drawn * images).sum(axis=1) / images.sum(axis=1)


def share_interval(value: float, drawn: np.ndarray) -> Interval:
    """Return the `percentile_interval` of a share: with several runs, draws can exceed 0 or 1."""
    return percentile_interval(value, drawn.clip(0, 1))


def percentile_interval(value: float, drawn: np.ndarray) -> Interval:
    """Return the interval that holds LEVEL of `drawn`, (draws,), and `value` in any case."""
    # Rounded, so that 0.1 + 0.2 - 0.3 is nothing: a limit of 0 decides on a difference.
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).round(12).tolist()
    return Interval(value, min(low, value), max(high, value))


def _times_drawn(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """Draw `n` of `n` patients, `draws` times; return how often each was drawn, (draws, n)."""
    drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
