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

from chest.core.errors import ParameterError, Problem, refuse
from chest.core.labels import MODALITIES
from chest.evaluation.intervals import (
    DRAWS,
    Bootstrap,
    Interval,
    Intervals,
    around,
    averages,
    constant_classes,
    recall_draws,
    unmoved,
)
from chest.evaluation.metrics import check_answers, classification_metrics
from chest.evaluation.predictions import System

ONE_RUN = "one training run: its own noise is not in the interval"
Runs = pd.DataFrame | Sequence[pd.DataFrame]  # one run of a system, or several


@dataclass(frozen=True)
class Difference:
    """A figure of both systems, the mean over runs.

    ``change`` is second minus first with its 95 % interval, ``p`` the two-sided p-value of the
    bootstrap, ``smallest`` half the width of the interval: the smallest difference that these
    images can show.
    """

    first: float
    second: float
    change: Interval
    p: float
    smallest: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.change.low > 0 or self.change.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same images.

    ``images`` and ``patients`` count those of each class and the ``total``; ``recall`` has the
    classes that occur. ``only_first`` and ``only_second`` are images that one alone answered right,
    ``unlike`` those that got different answers (means over the pairs of runs). ``runs`` is the
    number of runs of each.
    """

    images: dict[str, int]
    patients: dict[str, int]
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
    split: str | None = None,
    draws: int = DRAWS,
    names: Sequence[str] = ("first", "second"),
) -> Comparison:
    """Compare the answers of two systems to the same images.

    Each is a table or a list of tables (runs) with the columns image_id, split, actual, predicted
    and patient_id, in any order of rows. `split` selects the images of one split; `names` are what
    error messages call the two. Raises InputError if the images, labels or patients differ.
    """
    sides = [_as_list(first), _as_list(second)]
    tables = _aligned([*sides[0], *sides[1]], split, names, len(sides[0]))
    sides = [tables[: len(sides[0])], tables[len(sides[0]) :]]
    bootstrap = Bootstrap(tables[0], seed, draws)
    right = [[(t["actual"] == t["predicted"]).to_numpy() for t in runs] for runs in sides]
    drawn, images = _difference_draws(bootstrap, sides, right)
    uar, war = averages(drawn, images)
    figures = [_mean_metrics(runs) for runs in sides]

    def difference(draws_of: np.ndarray, *keys: str) -> Difference:
        a, b = (_lookup(own, keys) for own in figures)
        change = around(b - a, draws_of)
        half = (change.high - change.low) / 2
        return Difference(a, b, change, p_value(draws_of), half)

    pairs = [(a, b) for a in range(len(sides[0])) for b in range(len(sides[1]))]
    recalls = {x: difference(drawn[:, k], "recall", x) for k, x in enumerate(bootstrap.classes)}
    return Comparison(
        images=_with_total(bootstrap, bootstrap.images.sum(axis=0), len(tables[0])),
        patients=_with_total(bootstrap, bootstrap.patients, len(bootstrap.images)),
        uar=difference(uar, "uar"),
        war=difference(war, "war"),
        recall=recalls,
        only_first=_mean_count(right[0][a] & ~right[1][b] for a, b in pairs),
        only_second=_mean_count(right[1][b] & ~right[0][a] for a, b in pairs),
        unlike=_mean_count(
            (sides[0][a]["predicted"] != sides[1][b]["predicted"]).to_numpy() for a, b in pairs
        ),
        runs=(len(sides[0]), len(sides[1])),
    )


def pooled(runs: Runs, seed: int, draws: int = DRAWS) -> Intervals:
    """Return UAR, WAR and recalls of a system, means over its runs on the same images.

    The intervals hold the noise of patients and, with several runs, that of training.
    """
    tables = _aligned(_as_list(runs), None, ("the first run", "another run"), 1)
    for table in tables:
        check_answers(table["actual"], table["predicted"])
    bootstrap = Bootstrap(tables[0], seed, draws)
    right = [(t["actual"] == t["predicted"]).to_numpy() for t in tables]
    drawn, images = _run_draws(bootstrap, tables, right, stream=2)
    uar, war = averages(drawn, images)
    own = _mean_metrics(tables)
    recalls = {x: around(own["recall"][x], drawn[:, k]) for k, x in enumerate(bootstrap.classes)}
    return Intervals(around(own["uar"], uar), around(own["war"], war), recalls)


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


PRIMARY_COLUMNS = (
    *("modality", "baseline", "baseline_name", "baseline_val_uar", "images", "patients"),
    *("baseline_uar", "uar", "difference", "low", "high", "p", "p_holm", "better"),
    *("smallest_difference", "runs", "note"),
)


def primary_comparisons(
    systems: dict[str, System],
    primary: str,
    seed: int,
    runs: Sequence[pd.DataFrame] = (),
    split: str = "test",
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Answer the two questions asked in advance; everything else is exploratory.

    Is the UAR of `primary` within CT, and within X-ray, higher than that of the best blind
    baseline? The baseline is the one with the highest UAR within the modality on validation.
    `runs` are the answers of further runs of `primary` with other seeds.

    Returns one row per modality with PRIMARY_COLUMNS: the UARs on `split`, their difference with
    its 95 % interval, its p-value, raw and after Holm's correction, and ``better``: whether that is
    below 0.05 and the difference positive. A modality without two classes is left out.
    """
    if primary not in systems:
        found = f"evaluation.primary: {primary}"
        raise ParameterError(f"params.yaml: {found}: one of {', '.join(systems)} expected")
    rows = []
    answers = [systems[primary].answers, *runs]
    for modality in MODALITIES:
        own = [_part(table, split, modality) for table in answers]
        best = _best_baseline(systems, modality)
        if best is None or own[0]["actual"].nunique() < 2:
            continue
        baseline, val_uar = best
        result = compare(_part(baseline.answers, split, modality), own, seed, None, draws)
        rows.append(
            {
                "modality": modality,
                "baseline": baseline.key,
                "baseline_name": baseline.name,
                "baseline_val_uar": val_uar,
                "images": result.images["total"],
                "patients": result.patients["total"],
                "baseline_uar": result.uar.first,
                "uar": result.uar.second,
                "difference": result.uar.change.value,
                "low": result.uar.change.low,
                "high": result.uar.change.high,
                "p": result.uar.p,
                "smallest_difference": result.uar.smallest,
                "runs": len(own),
                "note": ONE_RUN if len(own) == 1 else "",
            }
        )
    table = pd.DataFrame(rows, columns=PRIMARY_COLUMNS)
    table["p_holm"] = holm(table["p"])
    table["better"] = (table["p_holm"] < 0.05) & (table["difference"] > 0)
    return table


def verdicts(result: Comparison, names: Sequence[str] = ("first", "second")) -> list[str]:
    """Say whether the two differ in UAR and in WAR by more than noise: sentences."""
    if not result.unlike:
        return [f"No difference: the same answers to all {result.images['total']:,} images."]
    figures = {"UAR": result.uar, "WAR": result.war}
    said = [f"{verdict(name, difference, names)}." for name, difference in figures.items()]
    return said + ([f"{result.note[0].upper()}{result.note[1:]}."] if result.note else [])


def verdict(figure: str, difference: Difference, names: Sequence[str] = ("first", "second")) -> str:
    """Say in words, without a full stop, whether one figure differs by more than noise."""
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
    """Return a difference in percentage points, with its sign: ``+1.5``, ``-0.2``, ``0.0``."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


# --- Draws -----------------------------------------------------------------------------------


def _difference_draws(
    bootstrap: Bootstrap, sides: list[list[pd.DataFrame]], right: list[list[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the difference of each recall, and the images behind it: (draws, C) each."""
    drawn = []
    for k, (tables, own) in enumerate(zip(sides, right, strict=True)):
        recalls, images = _run_draws(bootstrap, tables, own, stream=2 + k, fallback=False)
        drawn.append(recalls)
    change = drawn[1] - drawn[0]
    counts = [sum(bootstrap.count(x) for x in own) for own in right]
    net = len(right[0]) * counts[1] - len(right[1]) * counts[0]
    certain = _constant(bootstrap, sides[0]) & _constant(bootstrap, sides[1])
    shares = [np.mean(own, axis=0) for own in right]
    rng = bootstrap.posterior()
    for k in np.flatnonzero(unmoved(bootstrap, net) & ~certain):
        of_class = bootstrap.label == k
        a, b = (shares[i][of_class] * (1 - shares[1 - i][of_class]) for i in (0, 1))
        outcome = np.array([a.mean(), b.mean(), 1 - a.mean() - b.mean()])
        posterior = rng.dirichlet(bootstrap.patients[k] * outcome + 0.5, bootstrap.draws)
        noise = change[:, k] - (shares[1] - shares[0])[of_class].mean()  # of training, if any
        change[:, k] = posterior[:, 1] - posterior[:, 0] + noise
    return change, images


def _run_draws(
    bootstrap: Bootstrap,
    tables: list[pd.DataFrame],
    right: list[np.ndarray],
    stream: int,
    fallback: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean recall over runs of each class, and the images: (draws, C) each; see module."""
    constant = np.ones(len(bootstrap.classes), bool)  # no posterior
    if fallback:
        constant = _constant(bootstrap, tables)
    every = [recall_draws(bootstrap, own, constant) for own in right]
    recalls, images = np.stack([recall for recall, _ in every]), every[0][1]
    runs = len(recalls)
    mean = recalls.mean(axis=0)
    if runs > 1:
        rng = np.random.default_rng([bootstrap.seed, stream])
        chosen = rng.multinomial(runs, np.full(runs, 1 / runs), bootstrap.draws) / runs
        picked = np.einsum("dr,rdc->dc", chosen, recalls)
        mean = mean + np.sqrt(runs / (runs - 1)) * (picked - mean)
    return mean, images


def _constant(bootstrap: Bootstrap, tables: list[pd.DataFrame]) -> np.ndarray:
    """Return which classes got a constant answer in every run: bool, (C,)."""
    return np.all([constant_classes(table, bootstrap.classes) for table in tables], axis=0)


# --- Tables ----------------------------------------------------------------------------------


def _as_list(runs: Runs) -> list[pd.DataFrame]:
    return [runs] if isinstance(runs, pd.DataFrame) else list(runs)


def _part(answers: pd.DataFrame, split: str, modality: str) -> pd.DataFrame:
    return answers[(answers["split"] == split) & (answers["modality"] == modality)]


def _best_baseline(systems: dict[str, System], modality: str) -> tuple[System, float] | None:
    """Return the blind system of the highest UAR within `modality` on validation, and the UAR."""
    scored = []
    for system in systems.values():
        val = _part(system.answers, "val", modality)
        if system.record.kind == "blind" and val["actual"].nunique() > 1:
            uar = classification_metrics(val["actual"], val["predicted"])["uar"]
            scored.append((system, uar))
    return max(scored, key=lambda pair: pair[1], default=None)  # the first of equals


def _mean_metrics(tables: list[pd.DataFrame]) -> dict:
    """Average UAR, WAR and recalls over runs."""
    every = [classification_metrics(t["actual"], t["predicted"]) for t in tables]
    mean = {key: float(np.mean([own[key] for own in every])) for key in ("uar", "war")}
    classes = every[0]["recall"]
    return mean | {
        "recall": {x: float(np.mean([own["recall"][x] for own in every])) for x in classes}
    }


def _lookup(figures: dict, keys: Sequence[str]) -> float:
    for key in keys:
        figures = figures[key]
    return figures


def _mean_count(which) -> int:
    return round(float(np.mean([chosen.sum() for chosen in which])))


def _with_total(bootstrap: Bootstrap, counts: np.ndarray, total: int) -> dict[str, int]:
    return {**dict(zip(bootstrap.classes, counts.tolist(), strict=True)), "total": total}


def _aligned(
    tables: list[pd.DataFrame], split: str | None, names: Sequence[str], first: int
) -> list[pd.DataFrame]:
    """Return `tables` restricted to `split` and sorted by image_id.

    The first `first` tables are called names[0] in messages, the others names[1]. Raises InputError
    unless all have the same images, labels and patients.
    """
    called = [names[0] if i < first else names[1] for i in range(len(tables))]
    pairs = list(zip(called, tables, strict=True))
    refuse(problem for name, table in pairs for problem in _own_problems(name, table, split))
    chosen = [
        (t if split is None else t[t["split"] == split]).set_index("image_id").sort_index()
        for t in tables
    ]
    refuse(
        problem
        for name, table in zip(called[1:], chosen[1:], strict=True)
        for problem in _shared_problems(chosen[0], table, f"{called[0]} and {name}")
    )
    return chosen


def _own_problems(name: str, table: pd.DataFrame, split: str | None) -> list[Problem]:
    problems = []
    twice = table.loc[table["image_id"].duplicated(), "image_id"]
    if len(twice):
        found = f"images more than once ({_some(twice)})"
        problems.append(Problem(name, found, "each image once", "remove the others"))
    if split is not None and not (table["split"] == split).any():
        found = f"no answers for {split}, only for {', '.join(sorted(set(table['split'])))}"
        remedy = "choose a split that both answered"
        problems.append(Problem(name, found, f"answers for {split}", remedy))
    return problems


def _shared_problems(first: pd.DataFrame, second: pd.DataFrame, both: str) -> list[Problem]:
    """Compare the images, labels and patients of two tables, indexed by image_id."""
    a, b = first.index.difference(second.index), second.index.difference(first.index)
    if len(a) or len(b):
        found = (
            f"{len(a):,} images only in the first, {len(b):,} only in the second"
            f" ({_some(a.union(b))}); {len(first.index.intersection(second.index)):,} in both"
        )
        remedy = "choose a split that both answered; runs must share seed, split and collections"
        return [Problem(both, found, "the same images", remedy)]
    return [
        Problem(
            both,
            f"another {what} for {unlike.sum():,} images ({_some(first.index[unlike])})",
            f"the same {what} for each image",
            "compare answers to the same images, with the same labels and patients",
        )
        for what, column in (("label", "actual"), ("patient", "patient_id"))
        if (unlike := (first[column] != second[column]).to_numpy()).any()
    ]


def _some(images: Sequence[str]) -> str:
    """Return the first three of `images`, for a message."""
    names = sorted(set(images))
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
