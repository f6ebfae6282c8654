"""What one run changed against another, and whether that is more than noise.

A run is a `Side`: what Git tracks of it and, where they are there, its predictions. What is said
here of two of them, `chest.report` shows to a reviewer.

**How a difference is judged.** Where both sides answered the same test images, by the 95 % interval
of the paired difference (`chest.comparison`). Without the predictions of one side there is none;
then two separate intervals that do not even overlap are taken for more than noise, if dvc.lock says
that both sides split the same images in the same way: that asks for more than the paired interval
would. Of two that overlap nothing is said.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml

from chest import predictions
from chest.comparison import Comparison, Difference, compare, points, verdicts
from chest.dataset import MANIFEST, SPLIT
from chest.errors import InputError, Problem, refuse
from chest.files import read_table, require_file
from chest.labels import LABEL_NAMES, LABELS, SPLITS, UNPARSED
from chest.metrics import classification_metrics
from chest.systems import SYSTEM_NAMES, SYSTEMS, TRAINED

METRICS = ("test", "within", "ranking", "probes", "audit", "all")
COMPOSITION = (
    "label", "collection", "site", *(f"{s}_{n}" for s in SPLITS for n in ("images", "patients")),
)  # fmt: skip
NAMES = ("base", "now")
FIGURES = {"uar": "UAR", "war": "WAR"}
ANSWERS = {**LABEL_NAMES, UNPARSED: "Unparsed"}

SEED = 42  # of the draws: that of tools/compare.py, so that it gives the same intervals
NOTHING = "–"
LIMIT = re.compile(r"_(low|high)(?=\.|$)")
# Of one file. A run's files have some 3,000 values, 6 deep; YAML's aliases can make them endless.
MOST_VALUES, DEEPEST = 100_000, 50


@dataclass(frozen=True)
class Side:
    """One of the two runs, as its files tell of it; what is not there is empty or None.

    ``name``: base or now. ``about``: what is known of its revision. ``params``: by dotted key.
    ``metrics``: {file: content}. ``records``: metrics/runs.json. ``confusions``: {system: actual
    and predicted of its test images}. ``curve``: plots/training.csv. ``composition``:
    metrics/audit.csv. ``lock``: {output: its digest} of dvc.lock, or its own where the file
    is there. ``answers``: {system: predictions with patient_id}. ``absent``: {system: why it has
    none}.
    """

    name: str
    about: dict[str, str]
    params: dict[str, object]
    metrics: dict[str, dict]
    records: dict[str, dict]
    confusions: dict[str, pd.DataFrame]
    curve: pd.DataFrame | None
    composition: pd.DataFrame | None
    lock: dict[str, str]
    answers: dict[str, pd.DataFrame] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def test(self) -> dict[str, dict]:
        """metrics/test.json: {system: figures}."""
        return self.metrics["test"]

    def figures(self, system: str) -> dict[str, list]:
        """{key: [value, low, high]} of a system in metrics/test.json."""
        return fold(self.test.get(system, {}))


@dataclass(frozen=True)
class Judgement:
    """What can be said of one system: ``result``, or ``why`` there is none.

    ``same``: whether both sides are known to have answered the same test images; ``alike``: and to
    have given the same answers.
    """

    system: str
    result: Comparison | None
    why: str = ""
    same: bool = True
    alike: bool = False


@dataclass(frozen=True)
class Finding:
    """What is said of UAR or WAR of one system.

    ``beyond``: whether the difference is more than noise; None: that cannot be judged. ``said``:
    the same in words where there is no paired interval. ``cells``: base, now, difference, and its
    95 % interval.
    """

    system: str
    figure: str
    beyond: bool | None
    said: str
    cells: list[str]


# --- Reading ---------------------------------------------------------------------------------


def read_side(name: str, about: dict[str, str], folder: Path) -> Side:
    """The run whose files lie in `folder` as they do in the repository, without its predictions.

    Raises InputError where it has no metrics/test.json, or a json or yaml file is damaged.
    """
    content, problems = {}, []
    for path in ("params.yaml", "dvc.lock", "metrics/runs.json", *map(_metrics, METRICS)):
        try:
            content[path] = _read_mapping(folder / path)
        except (DvcException, OSError, ValueError, RecursionError) as error:
            expected = "what a run writes" if path.startswith("metrics") else "a mapping"
            problems.append(Problem(f"{name}: {path}", str(error), expected, "correct it"))
    if content.get(_metrics("test")) == {}:
        remedy = "run `dvc repro`" if name == "now" else "name a revision that has been run"
        file, expected = f"{name}: {_metrics('test')}", "the metrics of a run"
        problems.append(Problem(file, "not there, or empty", expected, remedy))
    refuse(problems)
    return Side(
        name=name,
        about=about,
        params=flatten(content["params.yaml"]),
        metrics={file: content[_metrics(file)] for file in METRICS},
        records=content["metrics/runs.json"],
        confusions=_read_confusions(folder),
        curve=_read_curve(folder),
        composition=_read_tracked(folder / "metrics/audit.csv", COMPOSITION),
        lock=_digests(content["dvc.lock"]),
    )


def _metrics(file: str) -> str:
    return f"metrics/{file}.json"


def _read_mapping(path: Path) -> dict:
    """A yaml or json file, empty where it is not there; in json, each value is a mapping too."""
    if not path.exists():
        return {}
    require_file(path)
    text, is_json = path.read_text(encoding="utf-8"), path.suffix == ".json"
    content = json.loads(text) if is_json else parse_yaml(text, path.name)
    if not isinstance(content, dict):
        raise ValueError(f"no mapping, but {type(content).__name__}")
    lone = [key for key, value in content.items() if is_json and not isinstance(value, dict)]
    if lone:
        raise ValueError(f"no mapping in {lone[0]!r}")
    _refuse_endless(content)
    return content


def _refuse_endless(content: Mapping) -> None:
    """Raise ValueError where `content` holds more than MOST_VALUES, or is deeper than DEEPEST."""
    waiting: list[tuple[object, int]] = [(content, 0)]
    seen = 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"more than {MOST_VALUES:,} values, or more than {DEEPEST} deep")
        inner = value.values() if isinstance(value, Mapping) else value
        if isinstance(inner, list | tuple) or inner is not value:
            waiting += ((one, depth + 1) for one in inner)


def _read_tracked(path: Path, columns: tuple[str, ...]) -> pd.DataFrame | None:
    """A table; None where it is not there or of another form: that of an older revision may be."""
    try:
        return read_table(path, columns)
    except InputError:
        return None


def _read_confusions(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {
        path.stem.removeprefix("confusion_"): _read_tracked(path, ("actual", "predicted"))
        for path in sorted((folder / "plots").glob("confusion_*.csv"))
    }
    return {
        system: table
        for system, table in tables.items()
        if table is not None
        and len(table)
        and set(table["actual"]) <= set(LABELS)
        and set(table["predicted"]) <= set(ANSWERS)
    }


def _read_curve(folder: Path) -> pd.DataFrame | None:
    table = _read_tracked(folder / "plots/training.csv", predictions.CURVE_COLUMNS)
    return None if table is None or table.empty else predictions.numbers_of(table)


def _digests(lock: dict) -> dict[str, str]:
    """{output: its digest} of a dvc.lock; whatever else it holds, DVC itself complains of."""
    stages = lock.get("stages")
    outs = [
        out
        for stage in (stages.values() if isinstance(stages, dict) else ())
        if isinstance(stage, dict) and isinstance(stage.get("outs"), list)
        for out in stage["outs"]
    ]
    return {
        out["path"]: str(out.get("md5", ""))
        for out in outs
        if isinstance(out, dict) and isinstance(out.get("path"), str)
    }


def digest(path: Path) -> str:
    """The digest of a file as dvc.lock has it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def flatten(tree: Mapping, parents: str = "") -> dict[str, object]:
    """The leaves of nested mappings by dotted key."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{parents}{key}"
        nested = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{name}.") if nested else {name: value}
    return leaves


def fold(tree: Mapping) -> dict[str, list]:
    """{key: [value, low, high]} of nested figures, by dotted key.

    ``uar_low`` and ``uar_high`` are the limits of ``uar``.
    """
    figures = flatten(tree)
    owner = {key: LIMIT.sub("", key) for key in figures}
    lone = [key for key in figures if owner[key] == key or owner[key] not in figures]
    folded = {key: [figures[key]] for key in lone}
    # The lower limit comes first, whichever the file has first.
    limits = [key for key in figures if key not in folded]
    for key in sorted(limits, key=lambda key: "high" in LIMIT.findall(key)):
        folded.get(owner[key], []).append(figures[key])
    return folded


def systems_of(*sides: Side) -> list[str]:
    """The systems that any of `sides` has metrics of, in the order of SYSTEMS."""
    found = {system for side in sides for system in side.test}
    return [s for s in SYSTEMS if s in found] + sorted(found - set(SYSTEMS))


def kept_epoch(side: Side) -> int:
    """The epoch that the run kept; where its record does not say, the one with the highest UAR."""
    epochs = side.curve["epoch"].astype(int).tolist()
    told = side.records.get(TRAINED, {}).get("best_epoch")
    return (
        int(told) if is_number(told) and told in epochs else epochs[side.curve["val_uar"].idxmax()]
    )


# --- The verdict -----------------------------------------------------------------------------


def judge(system: str, base: Side, now: Side) -> Judgement:
    """Compare the answers of `system` to the test split, as far as they are there and fit."""
    reasons = {side.name: _why_not(side, system) for side in (base, now)}
    lacking = [f"{name}: {why}" for name, why in reasons.items() if why]
    if lacking:
        same = all(_same_file(path, base, now) for path in (MANIFEST, SPLIT))
        figures = [[side.test.get(system, {}).get(key) for key in FIGURES] for side in (base, now)]
        answered = _same_file(predictions.path_of(system), base, now)
        alike = same and answered and figures[0] == figures[1]
        return Judgement(system, None, "; ".join(lacking), same, alike)
    try:
        result = compare(base.answers[system], now.answers[system], SEED, "test", names=NAMES)
    except InputError as error:
        found = "; ".join(problem.found for problem in error.problems)
        return Judgement(system, None, f"not the same test images: {found}", same=False)
    return Judgement(system, result)


def _same_file(path: Path, base: Side, now: Side) -> bool:
    """Whether `path` has the same content on both sides, as far as it or dvc.lock is there."""
    own = base.lock.get(path.as_posix())
    return own is not None and own == now.lock.get(path.as_posix())


def _why_not(side: Side, system: str) -> str:
    """Why the answers of `system` can not be used; empty where they can."""
    if system not in side.test:
        return "no such system"
    if system not in side.answers:
        return side.absent.get(system, "no predictions")
    test = of_test(side.answers[system])
    if test.empty:
        return "no answer of the test split"
    found = classification_metrics(test["actual"], test["predicted"])
    for key, name in FIGURES.items():
        told = side.test[system].get(key)
        if not is_number(told) or round(found[key], 4) != round(told, 4):
            return (
                f"{predictions.path_of(system)} gives a {name} of {found[key]:.4f},"
                f" metrics/test.json says {told}: not of one run"
            )
    return ""


def of_test(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers of the test split, indexed by image_id."""
    return answers[answers["split"] == "test"].set_index("image_id").sort_index()


def find(judgement: Judgement, base: Side, now: Side) -> list[Finding]:
    """What is said of UAR and WAR of a system; nothing where one side does not have it."""
    system, result = judgement.system, judgement.result
    if not all(system in side.test for side in (base, now)):
        return []
    figures = [side.figures(system) for side in (base, now)]
    findings = []
    for key, name in FIGURES.items():
        values = [own.get(key, []) for own in figures]
        difference = getattr(result, key) if result else None
        beyond, said = (
            (difference.beyond_noise, "") if difference else _judge_apart(judgement, values)
        )
        findings.append(Finding(system, name, beyond, said, cells_of(values, difference)))
    return findings


def _judge_apart(judgement: Judgement, figures: Sequence[list]) -> tuple[bool | None, str]:
    """Without a paired interval: what the separate ones and dvc.lock tell, and that in words.

    `figures` are those of base and now, [value, low, high].
    """
    if judgement.alike:
        return False, "no difference: dvc.lock has the same predictions on both sides"
    if not judgement.same:
        return None, "cannot be judged: not known to be of the same test images"
    if not all(len(own) == 3 and all(map(is_number, own)) for own in figures):
        return None, "cannot be judged without an interval"
    if max(low for _, low, _ in figures) > min(high for _, _, high in figures):
        return True, "more than noise: the two separate 95 % intervals do not even overlap"
    return None, "cannot be judged from two separate 95 % intervals that overlap"


def cells_of(figures: Sequence[list], difference: Difference | None) -> list[str]:
    """The cells of one figure: base, now, difference in points, and its 95 % interval.

    `figures` are those of base and now, [value, low, high], as far as they are known.
    """
    cells = [_percent(own) for own in figures]
    if difference:
        change = difference.change
        return [*cells, points(change.value), f"{points(change.low)} to {points(change.high)}"]
    if NOTHING in cells:
        return [*cells, NOTHING, NOTHING]
    return [*cells, points(figures[1][0] - figures[0][0]), NOTHING]


def _percent(figure: list) -> str:
    if not figure or not all(map(is_number, figure)):
        return NOTHING
    value, *limits = (f"{100 * x:.1f}" for x in figure)
    return f"{value} % ({' to '.join(limits)})" if limits else f"{value} %"


def is_number(value: object) -> bool:
    """Whether it can be reckoned with: finite, no bool, and no larger than floats are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def headline(findings: Sequence[Finding]) -> str:
    """The verdict in one sentence."""
    beyond = [
        f"{SYSTEM_NAMES.get(f.system, f.system)}: {f.figure} {f.cells[2]} points"
        for f in findings
        if f.beyond
    ]
    unknown = sum(f.beyond is None for f in findings)
    if unknown == len(findings):
        return "No difference can be judged."
    rest = f" {unknown} of {len(findings)} differences cannot be judged." if unknown else ""
    if not beyond:
        return f"No difference is more than noise.{rest}"
    return f"More than noise: {'; '.join(beyond)}.{rest}"


def tell(judgement: Judgement, findings: Sequence[Finding]) -> list[str]:
    """What is said of one system, in sentences."""
    result = judgement.result
    if not findings:
        return ["Only one side has it."]
    if result is None:
        by_said: dict[str, list[str]] = {}
        for finding in findings:
            by_said.setdefault(finding.said, []).append(finding.figure)
        return [f"{' and '.join(figures)}: {said}." for said, figures in by_said.items()]
    if not result.unlike:
        return verdicts(result, NAMES)
    changes = (
        f"{result.unlike:,} of {result.images['total']:,} answers changed: {result.only_first:,}"
        f" were right and are wrong, {result.only_second:,} were wrong and are right."
    )
    return [*verdicts(result, NAMES), changes]
