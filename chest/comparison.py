"""Is one system better than another, or one run than another, on the same images?

Both answered the same images, so what counts is the difference image by image: its interval is
narrower than two intervals that overlap suggest. Patients are drawn as in `chest.intervals`, the
same ones for both, and the interval is that of second minus first.

**Where drawing changes nothing**: where the two were right on the same images of a class, or one on
all and the other on none, the difference of that recall is the same in every draw. Ten patients on
whom two systems agree do not show that they always will: there the draws come from the posterior
under Jeffreys' prior of three outcomes (only the first right, only the second, neither or both),
Dirichlet(n a + 1/2, n b + 1/2, n (1 - a - b) + 1/2): n patients with images of the class, a and b
the shares of its images that only the first or only the second has right. So two runs with the same
answers differ by 0, give or take what so few patients could hide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from chest.errors import Problem, refuse
from chest.intervals import (
    DRAWS,
    Cohort,
    Interval,
    around,
    averages,
    cohort_of,
    posterior,
    resample,
    unmoved,
)
from chest.metrics import classification_metrics

SAME = "compare answers to the same images, with the same labels and patients"


@dataclass(frozen=True)
class Difference:
    """One figure of both systems; ``change``: second minus first, with its 95 % interval."""

    first: float
    second: float
    change: Interval

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.change.low > 0 or self.change.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same images.

    ``images`` and ``patients``: how many of each class, and both ``total``.
    ``recall``: of each class that occurs.
    ``only_first``, ``only_second``: images that one of both alone has right.
    ``unlike``: images that got another answer, right or wrong.
    ``mcnemar_p``: the p-value of McNemar's exact test. It takes the images as independent, which
    those of one patient are not, and so comes out too small; the intervals decide.
    """

    images: dict[str, int]
    patients: dict[str, int]
    uar: Difference
    war: Difference
    recall: dict[str, Difference]
    only_first: int
    only_second: int
    unlike: int
    mcnemar_p: float


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    seed: int,
    split: str | None = None,
    draws: int = DRAWS,
    names: Sequence[str] = ("first", "second"),
) -> Comparison:
    """Compare the answers of two systems or runs to the same images.

    Both tables have the columns image_id, split, actual, predicted and patient_id, in any order of
    rows; `split` takes the images of one split alone, `names` is what messages call them.

    Raises InputError where they are not of the same images: other image ids, labels or patients, an
    image twice, none of the split; otherwise what `chest.intervals.intervals` raises.
    """
    first, second = _same_images(first, second, split, names)
    figures = [classification_metrics(t["actual"], t["predicted"]) for t in (first, second)]
    cohort = cohort_of(first)
    right = [(t["actual"] == t["predicted"]).to_numpy() for t in (first, second)]
    only_first, only_second = right[0] & ~right[1], right[1] & ~right[0]
    uar, war, recalls = _drawn(cohort, only_first, only_second, seed, draws)

    def difference(drawn: np.ndarray, *keys: str) -> Difference:
        a, b = figures
        for key in keys:
            a, b = a[key], b[key]
        return Difference(a, b, around(b - a, drawn))

    return Comparison(
        images=_with_total(cohort, cohort.images.sum(0), len(first)),
        patients=_with_total(cohort, cohort.patients(), len(cohort.images)),
        uar=difference(uar, "uar"),
        war=difference(war, "war"),
        recall={
            label: difference(recalls[:, k], "recall", label)
            for k, label in enumerate(cohort.classes)
        },
        only_first=int(only_first.sum()),
        only_second=int(only_second.sum()),
        unlike=int((first["predicted"] != second["predicted"]).sum()),
        mcnemar_p=mcnemar(int(only_first.sum()), int(only_second.sum())),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: the p-value where one alone is right on so many images.

    Q. McNemar, Psychometrika 12, 1947, 153-157, with the binomial distribution in place of its
    approximation. Where no image tells the two apart, p is 1.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def verdicts(result: Comparison, names: Sequence[str] = ("first", "second")) -> list[str]:
    """Whether the two differ in UAR and in WAR by more than noise: a sentence each."""
    if not result.unlike:
        return [f"No difference: the same answers to all {result.images['total']:,} images."]
    figures = {"UAR": result.uar, "WAR": result.war}
    return [f"{verdict(name, difference, names)}." for name, difference in figures.items()]


def verdict(figure: str, difference: Difference, names: Sequence[str] = ("first", "second")) -> str:
    """What the interval says of one figure, in words, without a full stop: more than noise, or not.

    `names` is what to call the two systems.
    """
    change = difference.change
    limits = f"{points(change.low)} to {points(change.high)}"
    if difference.beyond_noise:
        better, worse = names[::-1] if change.value > 0 else names
        return (
            f"{figure}: more than noise: {better} is better than {worse} by"
            f" {100 * abs(change.value):.1f} points, and the 95 % interval ({limits}) excludes 0"
        )
    return (
        f"{figure}: not more than noise: {points(change.value)} points from {names[0]} to"
        f" {names[1]}, and the 95 % interval ({limits}) includes 0"
    )


def points(share: float) -> str:
    """A difference in percentage points, with its sign: ``+1.5``, ``-0.2``, ``0.0``."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def _drawn(
    cohort: Cohort, only_first: np.ndarray, only_second: np.ndarray, seed: int, draws: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws of the difference of UAR, of WAR, (draws,), and of the recalls, (draws, C).

    `only_first` and `only_second`, bool (N,), are the images that one alone has right.
    """
    lost, won = cohort.count(only_first), cohort.count(only_second)
    images, changes = resample(cohort, [cohort.images, won - lost], seed, draws)
    recalls = changes / images
    rng = posterior(seed)
    for k in np.flatnonzero(unmoved(cohort, won - lost)):
        n, of_class = cohort.patients()[k], cohort.images[:, k].sum()
        a, b = lost[:, k].sum() / of_class, won[:, k].sum() / of_class
        outcomes = rng.dirichlet(n * np.array([a, b, 1 - a - b]) + 0.5, draws)
        recalls[:, k] = outcomes[:, 1] - outcomes[:, 0]
    return *averages(recalls, images), recalls


def _with_total(cohort: Cohort, counts: np.ndarray, total: int) -> dict[str, int]:
    return {**dict(zip(cohort.classes, counts.tolist(), strict=True)), "total": total}


def _same_images(
    first: pd.DataFrame, second: pd.DataFrame, split: str | None, names: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, of `split` alone, sorted by image_id; raises InputError where they differ."""
    problems = [
        problem
        for name, table in zip(names, (first, second), strict=True)
        for problem in _own_problems(name, table, split)
    ]
    refuse(problems)
    first, second = (
        (table if split is None else table[table["split"] == split])
        .sort_values("image_id")
        .set_index("image_id")
        for table in (first, second)
    )
    refuse(_shared_problems(first, second, f"{names[0]} and {names[1]}"))
    return first, second


def _own_problems(name: str, table: pd.DataFrame, split: str | None) -> list[Problem]:
    problems = []
    doubled = table.loc[table["image_id"].duplicated(), "image_id"]
    if len(doubled):
        found = f"images more than once ({_some(doubled)})"
        problems.append(Problem(name, found, "each image once", "remove the others"))
    if split is not None and not (table["split"] == split).any():
        found = f"no answer of {split}, but of {', '.join(sorted(set(table['split'])))}"
        remedy = "name a split that both answered"
        problems.append(Problem(name, found, f"answers of {split}", remedy))
    return problems


def _shared_problems(first: pd.DataFrame, second: pd.DataFrame, both: str) -> list[Problem]:
    """Where two tables, indexed by image_id, are not of the same images."""
    a, b = first.index.difference(second.index), second.index.difference(first.index)
    if len(a) or len(b):
        found = (
            f"{len(a):,} images only in the first, {len(b):,} only in the second"
            f" ({_some(a.union(b))}); {len(first.index.intersection(second.index)):,} in both"
        )
        remedy = "name a split that both answered; runs must share it (seed, split, collections)"
        return [Problem(both, found, "the same images", remedy)]
    return [
        Problem(both, f"another {what} of {unlike.sum():,} images ({_some(first.index[unlike])})",
                f"the same {what} for each image", SAME)
        for what, column in (("label", "actual"), ("patient", "patient_id"))
        if (unlike := (first[column] != second[column]).to_numpy()).any()
    ]  # fmt: skip


def _some(images: Sequence[str]) -> str:
    """The first three of `images`, for a message."""
    names = sorted(set(images))
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
