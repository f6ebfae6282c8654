"""Paired comparison: is one system better than another on the same images?

Both answered the same images, so the interval is that of the difference, with the same patients
drawn for both (`chest.evaluation.intervals`). It is narrower than two separate intervals suggest.

**Several runs** of a system, trained with other seeds, differ too. Then each draw also draws the
runs, with replacement: a hierarchical bootstrap over patients and runs, for the mean over runs. Of
R runs it sees only (R - 1) / R of their variance, so the deviation from the mean is scaled by
sqrt(R / (R - 1)). With three runs it is still too narrow where training noise dominates; five are
enough for rough figures. With one run its own noise is not in the interval, and results say so.

**Where drawing changes nothing**, for instance where both were right on the same images of a class,
the difference of the recalls is drawn from the posterior under Jeffreys' prior of three outcomes
(only the first right, only the second, neither or both), Dirichlet(n a + 1/2, n b + 1/2,
n (1 - a - b) + 1/2), with n patients and a and b the shares of images that only one has right. Ten
patients on whom two systems agree do not prove that they always will.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from chest.core.errors import Problem, refuse
from chest.core.labels import MODALITIES
from chest.evaluation.intervals import (
    DRAWS,
    Bootstrap,
    Interval,
    Intervals,
    constant_across_draws,
    constant_classes,
    percentile_interval,
    recall_draws,
    recalls,
    summarize,
    uar_and_war,
)
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.predictions import System, part_of

ONE_RUN = "one training run: its own noise is not in the interval"
Runs = pd.DataFrame | Sequence[pd.DataFrame]  # one run of a system, or several


@dataclass(frozen=True)
class Difference:
    """A figure of both systems, the mean over runs.

    ``change`` is second minus first with its 95 % interval, ``p`` the two-sided p-value of the
    bootstrap.
    """

    first: float
    second: float
    change: Interval
    p: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.change.low > 0 or self.change.high < 0

    @property
    def half_width(self) -> float:
        """Half the width of the paired interval."""
        return (self.change.high - self.change.low) / 2


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same images.

    ``recall`` has the classes that occur. ``only_first`` and ``only_second`` are numbers of images
    that one alone answered right, ``unlike`` of those that got different answers (means over the
    pairs of runs). ``runs`` is the number of runs of each.
    """

    images: int
    patients: int
    uar: Difference
    war: Difference
    recall: dict[str, Difference]
    only_first: int
    only_second: int
    unlike: int
    runs: tuple[int, int]

    @property
    def note(self) -> str:
        """What the intervals leave out, if anything."""
        return ONE_RUN if min(self.runs) == 1 else ""


def compare(
    first: Runs,
    second: Runs,
    seed: int,
    draws: int = DRAWS,
    names: Sequence[str] = ("first", "second"),
) -> Comparison:
    """Compare the answers of two systems to the same images.

    Each is a table or a list of tables (runs) with the columns image_id, actual, predicted and
    patient_id, in any order of rows. `names` are what error messages call the two. Raises
    InputError if the images, labels or patients differ.
    """
    count = len(_as_list(first))
    tables = _aligned([*_as_list(first), *_as_list(second)], names)
    sides = tables[:count], tables[count:]
    bootstrap = Bootstrap(tables[0]["patient_id"], tables[0]["actual"], seed, draws)
    right = [np.array([_right(table) for table in side]) for side in sides]  # (R, N) each
    drawn, images = _difference_draws(bootstrap, sides, right)

    figures = [_figures(bootstrap, own.mean(axis=0)) for own in right]
    all_drawn = np.column_stack([*uar_and_war(drawn, images), drawn])
    uar, war, *recall = [
        Difference(float(a), float(b), percentile_interval(float(b - a), own), p_value(own))
        for a, b, own in zip(*figures, all_drawn.T, strict=True)
    ]
    said = [np.array([table["predicted"] for table in side]) for side in sides]
    only = right[0][:, None] & ~right[1], ~right[0][:, None] & right[1]  # (R, S, N)
    return Comparison(
        images=len(tables[0]),
        patients=len(bootstrap.images),
        uar=uar,
        war=war,
        recall=dict(zip(bootstrap.classes, recall, strict=True)),
        only_first=_mean_count(only[0]),
        only_second=_mean_count(only[1]),
        unlike=_mean_count(said[0][:, None] != said[1]),
        runs=(len(sides[0]), len(sides[1])),
    )


def pooled(runs: Runs, seed: int, draws: int = DRAWS) -> Intervals:
    """Return UAR, WAR and recalls of a system, means over its runs on the same images.

    The intervals hold the noise of patients and, with several runs, that of training.
    """
    tables = _aligned(_as_list(runs), ("the first run", "another run"))
    bootstrap = Bootstrap(tables[0]["patient_id"], tables[0]["actual"], seed, draws)
    right = np.array([_right(table) for table in tables])
    drawn, images = _run_draws(bootstrap, right, _constant(bootstrap, tables), stream=2)
    return summarize(bootstrap, right.mean(axis=0), drawn, images)


def p_value(drawn: np.ndarray) -> float:
    """Return the two-sided p-value that a difference is 0, from its bootstrap draws, (draws,).

    The count of draws on the far side of 0 is raised by one, so p is never 0.
    """
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of questions (Holm 1979), in their order."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted.tolist()


def primary_comparisons(
    systems: dict[str, System], primary: str, seed: int, draws: int = DRAWS
) -> list[dict]:
    """Answer the two questions asked in advance; everything else is exploratory.

    Is the UAR of `primary` within CT, and within X-ray, higher than that of the best blind
    baseline? The baseline is the one with the highest UAR within the modality on validation.

    Returns one dict per modality of two classes: modality, baseline (key), baseline_name,
    baseline_val_uar; of the test split images, patients, baseline_uar and uar; difference, low,
    high and smallest_difference (the half-width of the paired 95 % interval); p and p_holm (after
    Holm's correction), better (p_holm below 0.05 and the difference positive), and a note.
    """
    rows = []
    for modality in MODALITIES:
        own = part_of(systems[primary].answers, "test", modality)
        best = _best_baseline(systems, modality)
        if best is None or own["actual"].nunique() < 2:
            continue
        baseline, val_uar = best
        result = compare(part_of(baseline.answers, "test", modality), own, seed, draws)
        rows.append(
            {
                "modality": modality,
                "baseline": baseline.key,
                "baseline_name": baseline.name,
                "baseline_val_uar": val_uar,
                "images": result.images,
                "patients": result.patients,
                "baseline_uar": result.uar.first,
                "uar": result.uar.second,
                "difference": result.uar.change.value,
                "low": result.uar.change.low,
                "high": result.uar.change.high,
                "smallest_difference": result.uar.half_width,
                "p": result.uar.p,
                "note": result.note,
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": p, "better": p < 0.05 and row["difference"] > 0}
    return rows


# --- Draws -----------------------------------------------------------------------------------


def _difference_draws(
    bootstrap: Bootstrap, sides: Sequence[list[pd.DataFrame]], right: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the difference of each recall, and the images behind it: (draws, C) each.

    `right` are bool, (R, N), one per side: the images that each run answered right.
    """
    no_posterior = np.ones(len(bootstrap.classes), bool)  # one for the difference follows below
    (before, images), (after, _) = (
        _run_draws(bootstrap, own, no_posterior, stream=2 + k) for k, own in enumerate(right)
    )
    change = after - before
    counts = [sum(bootstrap.count(run) for run in own) for own in right]
    net = len(right[0]) * counts[1] - len(right[1]) * counts[0]
    certain = _constant(bootstrap, sides[0]) & _constant(bootstrap, sides[1])
    shares = [own.mean(axis=0) for own in right]
    rng = bootstrap.posterior()
    for k in np.flatnonzero(constant_across_draws(bootstrap, net) & ~certain):
        of_class = bootstrap.label == k
        a, b = (shares[i][of_class] * (1 - shares[1 - i][of_class]) for i in (0, 1))
        outcome = np.array([a.mean(), b.mean(), 1 - a.mean() - b.mean()])
        posterior = rng.dirichlet(bootstrap.patients[k] * outcome + 0.5, bootstrap.draws)
        noise = change[:, k] - (shares[1] - shares[0])[of_class].mean()  # of training, if any
        change[:, k] = posterior[:, 1] - posterior[:, 0] + noise
    return change, images


def _run_draws(
    bootstrap: Bootstrap, right: np.ndarray, constant: np.ndarray, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean recall over runs of each class, and the images: (draws, C) each; see module.

    `right` is bool, (R, N); `constant`, bool (C,), as in `recall_draws`.
    """
    every = [recall_draws(bootstrap, own, constant) for own in right]
    drawn, images = np.stack([own for own, _ in every]), every[0][1]
    runs = len(drawn)
    mean = drawn.mean(axis=0)
    if runs > 1:
        rng = np.random.default_rng([bootstrap.seed, stream])
        chosen = rng.multinomial(runs, np.full(runs, 1 / runs), bootstrap.draws) / runs
        picked = np.einsum("dr,rdc->dc", chosen, drawn)
        mean = mean + np.sqrt(runs / (runs - 1)) * (picked - mean)
    return mean, images


def _constant(bootstrap: Bootstrap, tables: list[pd.DataFrame]) -> np.ndarray:
    """Return which classes got a constant answer in every run: bool, (C,)."""
    return np.all([constant_classes(table, bootstrap.classes) for table in tables], axis=0)


# --- Tables ----------------------------------------------------------------------------------


def _as_list(runs: Runs) -> list[pd.DataFrame]:
    return [runs] if isinstance(runs, pd.DataFrame) else list(runs)


def _right(table: pd.DataFrame) -> np.ndarray:
    return (table["actual"] == table["predicted"]).to_numpy()


def _best_baseline(systems: dict[str, System], modality: str) -> tuple[System, float] | None:
    """Return the blind system of the highest UAR within `modality` on validation, and the UAR."""
    scored = []
    for system in systems.values():
        val = part_of(system.answers, "val", modality)
        if system.record.kind == "blind" and val["actual"].nunique() > 1:
            uar = classification_metrics(val["actual"], val["predicted"])["uar"]
            scored.append((system, uar))
    return max(scored, key=lambda pair: pair[1], default=None)  # the first of equals


def _figures(bootstrap: Bootstrap, right: np.ndarray) -> np.ndarray:
    """Return UAR, WAR and recalls, (2 + C,), of images that are right in a share of the runs."""
    own = recalls(bootstrap, right)
    return np.array([own.mean(), right.mean(), *own])


def _mean_count(chosen: np.ndarray) -> int:
    """Return how many images are chosen, bool (R, S, N), on average over the pairs of runs."""
    return round(float(chosen.sum(axis=-1).mean()))


def _aligned(tables: list[pd.DataFrame], names: Sequence[str]) -> list[pd.DataFrame]:
    """Return `tables` sorted by image_id.

    Raises InputError unless all have the images, labels and patients of the first.
    """
    tables = [table.set_index("image_id").sort_index() for table in tables]
    first, known = tables[0], ["actual", "patient_id"]
    for table in tables[1:]:
        found, expected = "", "the same images, with the same labels and patients"
        if not table.index.equals(first.index) or first.index.has_duplicates:
            one, other = first.index.difference(table.index), table.index.difference(first.index)
            found = f"{len(one):,} images only in the first, {len(other):,} only in the second"
            if twice := sum(x.index.duplicated().sum() for x in (first, table)):
                found += f", {twice:,} more than once"
        elif unlike := (table[known] != first[known]).any(axis=1).sum():
            found = f"another label or patient for {unlike:,} images"
        if found:
            remedy = "choose a split that both answered; runs must share split and collections"
            refuse([Problem(" and ".join(names), found, expected, remedy)])
    return tables
