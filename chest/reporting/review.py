"""What changed between two runs of the pipeline, and which differences are more than noise.

A run is read from what Git tracks of it: parameters, metrics, learning curves, and
``metrics/answers.csv``, from which every difference is judged image by image.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from chest.core.errors import InputError, Problem
from chest.core.labels import DISEASES, EVALUATED, MODALITY_NAMES
from chest.evaluation.comparison import ONE_RUN, Comparison, Difference, compare, holm, points
from chest.evaluation.intervals import DRAWS
from chest.evaluation.revisions import read_tracked

SEED = 42  # of the bootstrap: that of tools/compare.py, so that it gives the same intervals
WITHIN = {modality: f"UAR within {name}" for modality, name in MODALITY_NAMES.items()}
LIMITS = re.compile(r"(^|[._])(low|high)(\.|$)")  # of intervals, in the metrics files
NOT_BEYOND = "No primary difference is more than noise."
SHARED = {"patients": "Patients", "pixels": "Identical images"}


@dataclass(frozen=True)
class Side:
    """One of the two runs; what it lacks is empty.

    ``about``: its revision, commit, date and subject. ``metrics``: {file: figures}, without the
    limits of intervals. ``params``, ``audit``, ``runs`` and the figures are by
    dotted key. ``names``: {system: display name}. ``answers``: {system: one table per run, as
    `read_answers` gives them}. ``curves``: {system: (table by epoch, kept epoch)}.
    """

    about: dict[str, str]
    params: dict[str, object]
    metrics: dict[str, dict[str, object]]
    audit: dict[str, object]
    runs: dict[str, object]
    names: dict[str, str]
    answers: dict[str, list[pd.DataFrame]]
    curves: dict[str, tuple[pd.DataFrame, int | None]]


@dataclass(frozen=True)
class Change:
    """The difference of a figure of one system, now minus base.

    ``beyond_noise``: whether it is more than noise; if ``primary``, after Holm's correction.
    """

    system: str
    split: str
    figure: str
    difference: Difference
    primary: bool
    beyond_noise: bool


@dataclass(frozen=True)
class Review:
    """Two runs, the differences between them, and what a reader has to know first.

    ``pairs``: (system, split, answers in base, answers now), where both are of the same images.
    """

    base: Side
    now: Side
    pairs: list[tuple[str, str, pd.DataFrame, pd.DataFrame]]
    changes: list[Change]
    notes: list[str]

    def name(self, system: str) -> str:
        return self.now.names.get(system) or self.base.names.get(system, system)

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        beyond = [change for change in self.changes if change.beyond_noise]
        named = [
            f"{self.name(c.system)}: {c.figure} {points(c.difference.change.value)} points"
            for c in beyond
            if c.primary
        ]
        said = f"More than noise: {'; '.join(named)}." if named else NOT_BEYOND
        if not any(change.primary for change in self.changes):
            said = "The primary comparisons could not be made."
        left = len(beyond) - len(named)
        return f"{said} Exploratory: {left} more than noise." if left else said


# --- Reading ---------------------------------------------------------------------------------


def read_side(
    folder: Path, revision: str | None, about: dict[str, str], runs: Sequence[str] = ()
) -> Side:
    """Read the run whose tracked files lie in `folder`; its answers are those of `revision`.

    None stands for the working tree. `runs` are revisions with further runs of the same systems.
    Raises InputError if it has no answers, or a file is damaged.
    """
    files = {path.name: _read_json(path) for path in sorted((folder / "metrics").glob("*.json"))}
    records = files.pop("runs.json", {})
    audit = flatten(files.pop("audit.json", {}))
    metrics = {
        name: {key: value for key, value in flatten(content).items() if not LIMITS.search(key)}
        for name, content in files.items()
    }
    return Side(
        about=about,
        params=flatten(yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))),
        metrics=metrics,
        audit=audit,
        runs=flatten(records),
        names={system: record["name"] for system, record in records.items()},
        answers=_read_answers([revision, *runs]),
        curves={
            path.stem: (pd.read_csv(path), records[path.stem]["details"].get("best_epoch"))
            for path in sorted((folder / "plots/training").glob("*.csv"))
        },
    )


def _read_answers(revisions: Iterable[str | None]) -> dict[str, list[pd.DataFrame]]:
    answers: dict[str, list[pd.DataFrame]] = {}
    for revision in revisions:
        for system, table in read_tracked(revision).items():
            answers.setdefault(system, []).append(table)
    return answers


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problem = Problem(path.name, str(error), "a json file", "run `dvc repro evaluate`")
        raise InputError([problem]) from None


def flatten(tree: Mapping, parents: str = "") -> dict[str, object]:
    """Return the leaves of nested mappings by dotted key."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{parents}{key}.") if nested else {f"{parents}{key}": value}
    return leaves


# --- Judging ---------------------------------------------------------------------------------


def review(base: Side, now: Side) -> Review:
    """Judge the differences of every system that both runs have.

    The primary comparisons are those of ``evaluation.primary`` within each modality, on test.
    """
    primary = now.params.get("evaluation.primary")
    pairs, changes, notes = [], [], _notes(base, now)
    for system in sorted({*base.answers, *now.answers}, key=lambda key: (key != primary, key)):
        name = now.names.get(system) or base.names.get(system, system)
        if system not in base.answers or system not in now.answers:
            notes.append(f"{name} is {'new' if system in now.answers else 'gone'}.")
            continue
        for split in EVALUATED:
            sides = [[_part(run, split) for run in side.answers[system]] for side in (base, now)]
            if all(side[0].empty for side in sides):
                continue
            try:
                changes += _judge(system, split, sides, (system, split) == (primary, "test"))
                pairs.append((system, split, sides[0][0], sides[1][0]))
            except InputError as error:
                reason = "; ".join(problem.found for problem in error.problems)
                notes.append(f"{name}, {split}: cannot be compared: {reason}.")
    return Review(base, now, pairs, _corrected(changes), notes)


def _judge(system: str, split: str, sides: list[list[pd.DataFrame]], primary: bool) -> list[Change]:
    whole, within = compare_parts(*sides)
    if not whole.unlike and not primary:
        return []
    parts = {WITHIN[modality]: difference for modality, difference in within.items()}
    return [
        Change(system, split, name, d, primary and name in parts, d.beyond_noise)
        for name, d in {**parts, "UAR": whole.uar, "WAR": whole.war}.items()
    ]


def _part(table: pd.DataFrame, split: str) -> pd.DataFrame:
    return table[table["split"] == split].reset_index(drop=True)


def compare_parts(
    before: list[pd.DataFrame],
    after: list[pd.DataFrame],
    seed: int = SEED,
    draws: int = DRAWS,
    names: Sequence[str] = ("base", "now"),
) -> tuple[Comparison, dict[str, Difference]]:
    """Compare runs on all of their images, and their UAR within each modality of two classes."""
    whole, within = compare(before, after, seed, draws=draws, names=names), {}
    for modality, disease in DISEASES.items():
        parts = [[run[run["modality"] == modality] for run in runs] for runs in (before, after)]
        if {*parts[0][0]["actual"]} >= {"normal", disease}:
            within[modality] = compare(*parts, seed, draws=draws, names=names).uar
    return whole, within


def cells(difference: Difference) -> list[str]:
    """Return both figures, the difference, its interval, and the smallest visible difference."""
    change = difference.change
    return [
        f"{100 * difference.first:.1f} %",
        f"{100 * difference.second:.1f} %",
        points(change.value),
        f"{points(change.low)} to {points(change.high)}",
        f"{100 * difference.smallest:.1f}",
    ]


def _corrected(changes: list[Change]) -> list[Change]:
    """Judge the primary comparisons after Holm's correction, and put them first."""
    primary = [change for change in changes if change.primary]
    adjusted = holm([change.difference.p for change in primary])
    judged = [replace(c, beyond_noise=p < 0.05) for c, p in zip(primary, adjusted, strict=True)]
    return judged + [change for change in changes if not change.primary]


def _notes(base: Side, now: Side) -> list[str]:
    notes = []
    profiles = [side.params.get("profile") for side in (base, now)]
    if profiles[0] != profiles[1]:
        notes.append(f"Base is of the profile {profiles[0]}, now of {profiles[1]}.")
    if profiles[1] == "phantom":
        notes.append("Phantom run: the images are drawn; no figure says anything about real lungs.")
    for what, name in SHARED.items():
        if count := now.audit.get(f"audit.shared.{what}"):
            notes.append(f"{name} in more than one split: {count:,}. Figures are too good.")
    if any(len(runs) == 1 for side in (base, now) for runs in side.answers.values()):
        notes.append(f"{ONE_RUN[0].upper()}{ONE_RUN[1:]}.")
    return notes
