"""How sure figures are: 95 % intervals of UAR, WAR and recalls, by drawing the patients anew.

Images of one patient are alike, and an interval that counts each of them as news is too narrow. So
patients are drawn, with all of their images: the cluster bootstrap (C. A. Field and A. H. Welsh,
"Bootstrapping clustered data", Journal of the Royal Statistical Society B 69, 2007, 369-390), with
the percentiles of what comes out as limits. A recall is a ratio of sums: right answers to images.

A patient's stratum is the set of classes that the patient's images have (nearly always one), and
each draw takes as many patients of a stratum as there are: every draw has images of every class. A
patient who is alone in a stratum is in every draw.

**Where drawing changes nothing**: where a class was answered all right or all wrong, has one
patient, or its patients all have the same share of right answers, the recall is the same in every
draw, and a limit equal to the value would claim a certainty that ten patients do not give. There
the draws of the recall come from its posterior under Jeffreys' prior, Beta(n r + 1/2,
n (1 - r) + 1/2): r the recall, n the number of patients (not images) with images of the class.
That is the Jeffreys interval of L. D. Brown, T. T. Cai and A. DasGupta, "Interval estimation for a
binomial proportion", Statistical Science 16, 2001, 101-133, of n patients; as there, a limit never
excludes the value itself. UAR and WAR are made of these draws too, and so share the doubt.

With few patients the limits are somewhat too close. On drawn cases with a known truth, the interval
of a recall held it in 85 to 90 % where its class had 10 patients, in 90 to 94 % where it had 30;
that of a UAR in 90 to 92 % with 30, 20 and 10 patients a class, in 94 % with 60, 50 and 30.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from chest.errors import ChestError
from chest.labels import LABELS
from chest.metrics import check_answers

LEVEL = 0.95
DRAWS = 2000
FEWEST_DRAWS, MOST_DRAWS = 1000, 1_000_000  # with fewer, the limits themselves are noise
CHUNK = 100_000  # numbers held at a time, however many patients there are: they fit into the cache


class ResamplingError(ChestError):
    """Answers, a seed or a number of draws from which no interval can be made."""


@dataclass(frozen=True)
class Interval:
    """A figure and the limits of its interval: low <= value <= high."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """One system's UAR, WAR and recall of each class that occurs, each with its interval."""

    uar: Interval
    war: Interval
    recall: dict[str, Interval]


@dataclass(frozen=True)
class Cohort:
    """The patients whose images were answered: N images of P patients and C classes.

    ``classes``: those that occur, in the order of LABELS.
    ``cell``: int64, (N,): patient number times C plus class number of each image.
    ``images``: int64, (P, C): how many images of each class a patient has.
    ``strata``: the numbers of the patients in each stratum, int64, ascending.
    """

    classes: tuple[str, ...]
    cell: np.ndarray
    images: np.ndarray
    strata: tuple[np.ndarray, ...]

    def patients(self) -> np.ndarray:
        """How many patients have images of each class, int64, (C,)."""
        return (self.images > 0).sum(0)

    def count(self, which: np.ndarray) -> np.ndarray:
        """How many images of each patient and class `which`, bool (N,), holds: int64, (P, C)."""
        cells = np.bincount(self.cell[which], minlength=self.images.size)
        return cells.reshape(self.images.shape)


def intervals(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> Intervals:
    """The 95 % intervals of what one system answered.

    `table` has one row an image: actual and predicted (as `classification_metrics` takes them) and
    patient_id. The order of its rows does not matter. The values are those of
    `classification_metrics`; a class that is not in `actual` is left out.

    Raises MetricsError where the answers cannot be scored, ResamplingError where a patient_id is
    missing, `seed` is negative or `draws` not between FEWEST_DRAWS and MOST_DRAWS.
    """
    check_answers(table["actual"], table["predicted"])
    cohort = cohort_of(table)
    right = cohort.count((table["actual"] == table["predicted"]).to_numpy())
    images, rights = resample(cohort, [cohort.images, right], seed, draws)
    recalls = rights / images
    own = right.sum(0) / cohort.images.sum(0)
    rng = posterior(seed)
    for k in np.flatnonzero(unmoved(cohort, right)):
        n, share = cohort.patients()[k], own[k]
        recalls[:, k] = rng.beta(n * share + 0.5, n * (1 - share) + 0.5, draws)
    uar, war = averages(recalls, images)
    return Intervals(
        uar=around(float(own.mean()), uar),
        war=around(float(right.sum() / len(table)), war),
        recall={
            label: around(float(own[k]), recalls[:, k]) for k, label in enumerate(cohort.classes)
        },
    )


def cohort_of(table: pd.DataFrame) -> Cohort:
    """The patients and classes of `table`, columns actual and patient_id."""
    if table["patient_id"].isna().any() or (table["patient_id"] == "").any():
        raise ResamplingError("images without a patient_id: nobody to draw")
    classes = tuple(label for label in LABELS if (table["actual"] == label).any())
    patient, names = pd.factorize(table["patient_id"], sort=True)
    shape = len(names), len(classes)
    cell = patient * len(classes) + pd.Categorical(table["actual"], classes).codes
    images = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    stratum = (images > 0) @ (1 << np.arange(len(classes)))  # a bit for each class
    strata = tuple(np.flatnonzero(stratum == s) for s in np.unique(stratum))
    return Cohort(classes, cell, images, strata)


def resample(cohort: Cohort, counts: list[np.ndarray], seed: int, draws: int) -> list[np.ndarray]:
    """The sums of each of `counts`, (P, C), over the patients of each draw: float64, (draws, C).

    The patients drawn depend on the cohort, the seed and the number of draws alone: what is counted
    is summed over the same patients. Sums of whole numbers are exact, so that they are the same on
    every machine.
    """
    if seed < 0 or not FEWEST_DRAWS <= draws <= MOST_DRAWS:
        needed = f"a seed from 0 upwards, {FEWEST_DRAWS:,} to {MOST_DRAWS:,} draws"
        raise ResamplingError(f"seed {seed} and {draws:,} draws found, {needed} expected")
    columns = np.hstack(counts).astype(np.float64)
    sums = np.zeros((draws, columns.shape[1]))
    generators = np.random.default_rng(seed).spawn(len(cohort.strata))
    for members, rng in zip(cohort.strata, generators, strict=True):
        step = max(1, CHUNK // len(members))
        for start in range(0, draws, step):
            weights = _times_drawn(rng, len(members), min(step, draws - start))
            sums[start : start + step] += weights @ columns[members]
    return np.hsplit(sums, len(counts))


def _times_drawn(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """How often each of `n` patients is in each draw of `n`: float64, (draws, n)."""
    drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def unmoved(cohort: Cohort, counts: np.ndarray) -> np.ndarray:
    """The classes whose ratio of `counts`, int64 (P, C), to images is the same in all draws.

    Returns bool, (C,). It is so where what patients have above their due (counts minus ratio times
    images) is equal within each stratum: then any draw adds up to what the whole does, to nothing.
    """
    above = counts * cohort.images.sum(0) - cohort.images * counts.sum(0)  # times all images
    return np.all([np.ptp(above[members], axis=0) == 0 for members in cohort.strata], axis=0)


def posterior(seed: int) -> np.random.Generator:
    """What draws where drawing patients changes nothing: another stream than theirs."""
    return np.random.default_rng([seed, 1])


def averages(recalls: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UAR and WAR, (draws,), of recalls and numbers of images, (draws, C)."""
    return recalls.mean(1), (recalls * images).sum(1) / images.sum(1)


def around(value: float, drawn: np.ndarray) -> Interval:
    """The interval that holds LEVEL of what was `drawn`, (draws,), and `value` in any case."""
    # Rounded, so that 0.1 + 0.2 - 0.3 is nothing: a limit of 0 decides on a difference.
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).round(12).tolist()
    return Interval(value, min(low, value), max(high, value))
