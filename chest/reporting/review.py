"""What changed between two runs of the pipeline, and which differences are more than noise.

A run is read from what Git tracks of it: parameters, metrics, learning curves, and
``metrics/answers.csv``, from which every difference is judged image by image.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from chest.core.errors import InputError
from chest.core.labels import DISEASES, EVALUATED
from chest.evaluation.comparison import ONE_RUN, Comparison, Difference, compare, holm
from chest.evaluation.intervals import DRAWS
from chest.evaluation.revisions import read_tracked
from chest.reporting.charts import TrainingCurve
from chest.reporting.wording import UAR_WITHIN, capitalize, format_points

SEED = 42  # of the bootstrap: that of tools/compare.py, so that it gives the same intervals
LIMITS = re.compile(r"(^|[._])(low|high)(\.|$)")  # of intervals, in the metrics files
SHARED = {"patients": "Patients", "pixels": "Identical images"}


@dataclass(frozen=True)
class RunResults:
    """One of the two runs; what it lacks is empty.

    ``about``: its revision, commit, date and subject. ``metrics``: {file: figures}, without the
    limits of intervals. ``params``, ``audit``, ``runs`` and the figures are by
    dotted key. ``names``: {system: display name}. ``answers``: {system: one table per run, as
    `read_answers` gives them}. ``curves``: by system. ``controls``: ``plots/controls.csv``.
    """

    about: dict[str, str]
    params: dict[str, object]
    metrics: dict[str, dict[str, object]]
    audit: dict[str, object]
    runs: dict[str, object]
    names: dict[str, str]
    answers: dict[str, list[pd.DataFrame]]
    curves: dict[str, TrainingCurve]
    controls: pd.DataFrame


@dataclass(frozen=True)
class Change:
    """The difference of a figure of one system, now minus base.

    ``p`` is that of the difference; if ``primary``, after Holm's correction.
    """

    system: str
    split: str
    figure: str
    difference: Difference
    primary: bool
    p: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0; of a primary comparison, whether ``p`` is below 0.05."""
        return self.p < 0.05 if self.primary else self.difference.beyond_noise


@dataclass(frozen=True)
class Review:
    """Two runs, the differences between them, and what a reader has to know first.

    ``pairs``: (system, split, answers in base, answers now), where both are of the same images.
    """

    base: RunResults
    now: RunResults
    pairs: list[tuple[str, str, pd.DataFrame, pd.DataFrame]]
    changes: list[Change]
    notes: list[str]

    def name(self, system: str) -> str:
        return (self.base.names | self.now.names)[system]

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        beyond = [change for change in self.changes if change.beyond_noise]
        named = [
            f"{self.name(c.system)}: {c.figure} {format_points(c.difference.change.value)} points"
            for c in beyond
            if c.primary
        ]
        if named:
            said = f"More than noise: {'; '.join(named)}."
        elif any(change.primary for change in self.changes):
            said = "No primary difference is more than noise."
        else:
            said = "The primary comparisons could not be made."
        left = len(beyond) - len(named)
        return f"{said} Exploratory: {left} more than noise." if left else said


# --- Reading ---------------------------------------------------------------------------------


def read_results(
    folder: Path, revision: str | None, about: dict[str, str], runs: Sequence[str] = ()
) -> RunResults:
    """Read the run whose tracked files lie in `folder`; its answers are those of `revision`.

    None stands for the working tree. `runs` are revisions with further runs of the same systems.
    Raises InputError if it has no answers.
    """
    paths = sorted((folder / "metrics").glob("*.json"))
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    records = files.pop("runs.json", {})
    audit = flatten(files.pop("audit.json", {}))
    controls = folder / "plots/controls.csv"
    metrics = {
        name: {key: value for key, value in flatten(content).items() if not LIMITS.search(key)}
        for name, content in files.items()
    }
    return RunResults(
        about=about,
        params=flatten(yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))),
        metrics=metrics,
        audit=audit,
        runs=flatten(records),
        names={system: record["name"] for system, record in records.items()},
        answers=_read_answers([revision, *runs]),
        curves={
            path.stem: TrainingCurve.of(pd.read_csv(path), records[path.stem]["details"])
            for path in sorted((folder / "plots/training").glob("*.csv"))
        },
        controls=pd.read_csv(controls) if controls.exists() else pd.DataFrame(),
    )


def _read_answers(revisions: Iterable[str | None]) -> dict[str, list[pd.DataFrame]]:
    answers: dict[str, list[pd.DataFrame]] = {}
    for revision in revisions:
        for system, table in read_tracked(revision).items():
            answers.setdefault(system, []).append(table)
    return answers


def flatten(tree: Mapping, parents: str = "") -> dict[str, object]:
    """Return the leaves of nested mappings by dotted key."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{parents}{key}.") if nested else {f"{parents}{key}": value}
    return leaves


# --- Judging ---------------------------------------------------------------------------------


def review(base: RunResults, now: RunResults) -> Review:
    """Judge the differences of every system that both runs have.

    The primary comparisons are those of ``evaluation.primary`` within each modality, on test.
    """
    primary = now.params.get("evaluation.primary")
    pairs, changes, notes = [], [], _notes(base, now)
    for system in sorted({*base.answers, *now.answers}, key=lambda key: (key != primary, key)):
        name = (base.names | now.names)[system]
        if system not in base.answers or system not in now.answers:
            notes.append(f"{name} is {'new' if system in now.answers else 'gone'}.")
            continue
        for split in EVALUATED:
            before, after = (
                [run[run["split"] == split].reset_index(drop=True) for run in side.answers[system]]
                for side in (base, now)
            )
            if before[0].empty and after[0].empty:
                continue
            try:
                whole, within = compare_parts(before, after)
            except InputError as error:
                reason = "; ".join(problem.found for problem in error.problems)
                notes.append(f"{name}, {split}: cannot be compared: {reason}.")
                continue
            pairs.append((system, split, before[0], after[0]))
            asked = (system, split) == (primary, "test")
            if asked or whole.unlike:
                changes += _changes(system, split, whole, within, asked)
    changes.sort(key=lambda change: not change.primary)  # stable: the primary ones first
    return Review(base, now, pairs, changes, notes)


def compare_parts(
    before: list[pd.DataFrame],
    after: list[pd.DataFrame],
    seed: int = SEED,
    draws: int = DRAWS,
    names: Sequence[str] = ("base", "now"),
) -> tuple[Comparison, dict[str, Difference]]:
    """Compare runs on all of their images, and their UAR within each modality of two classes."""
    whole, within = compare(before, after, seed, draws, names), {}
    for modality, disease in DISEASES.items():
        parts = [[run[run["modality"] == modality] for run in runs] for runs in (before, after)]
        if {*parts[0][0]["actual"]} >= {"normal", disease}:
            within[modality] = compare(*parts, seed, draws, names).uar
    return whole, within


def _changes(
    system: str, split: str, whole: Comparison, within: dict[str, Difference], primary: bool
) -> list[Change]:
    adjusted = [difference.p for difference in within.values()]
    adjusted = holm(adjusted) if primary else adjusted
    changes = [
        Change(system, split, UAR_WITHIN[modality], difference, primary, p)
        for (modality, difference), p in zip(within.items(), adjusted, strict=True)
    ]
    for figure, difference in {"UAR": whole.uar, "WAR": whole.war}.items():
        changes.append(Change(system, split, figure, difference, False, difference.p))
    return changes


def _notes(base: RunResults, now: RunResults) -> list[str]:
    notes = []
    profiles = [side.params.get("profile") for side in (base, now)]
    if profiles[0] != profiles[1]:
        notes.append(f"Base is of the profile {profiles[0]}, now of {profiles[1]}.")
    if profiles[1] == "phantom":
        notes.append("Phantom run: the images are drawn; no figure says anything about real lungs.")
    for what, name in SHARED.items():
        if count := now.audit.get(f"audit.shared.{what}"):
            said = "Reported performance is optimistic"
            notes.append(f"{name} in more than one split: {count:,}. {said}.")
    if any(len(runs) == 1 for side in (base, now) for runs in side.answers.values()):
        notes.append(f"{capitalize(ONE_RUN)}.")
    return notes
