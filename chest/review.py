"""What one run changed against another, for a reviewer: the report that tools/review.py writes.

A run is a `Side`: what Git tracks of it and, where they are there, its predictions. The report is
filled twice from the same values: as Markdown for a pull request, which never holds a picture, and
as one HTML file that holds its pictures itself. Both escape what the project did not write itself
(`Verbatim`): names of revisions, sites and images, values of parameters.

**How a difference is judged.** Where both sides answered the same test images, by the 95 % interval
of the paired difference (`chest.comparison`). Without the predictions of one side there is none;
then two separate intervals that do not even overlap are taken for more than noise, if dvc.lock says
that both sides split the same images in the same way: that asks for more than the paired interval
would. Of two that overlap nothing is said.
"""

import base64
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from chest import charts, predictions
from chest.comparison import Comparison, Difference, compare, points, verdicts
from chest.dataset import MANIFEST, SPLIT
from chest.errors import InputError, Problem, printable, refuse
from chest.files import read_table
from chest.labels import LABEL_NAMES, LABELS, SPLITS, UNPARSED
from chest.metrics import classification_metrics
from chest.staleness import StaleStage
from chest.systems import SYSTEM_NAMES, SYSTEMS

TEMPLATES = Path(__file__).parent / "templates"
TRAINED = "finetune_siglip"
METRICS = ("test", "within", "ranking", "probes", "audit", "all")
COMPOSITION = (
    "label", "collection", "site", *(f"{s}_{n}" for s in SPLITS for n in ("images", "patients")),
)  # fmt: skip
NAMES = ("base", "now")
FIGURES = {"uar": "UAR", "war": "WAR"}
ANSWERS = {**LABEL_NAMES, UNPARSED: "Unparsed"}

SEED = 42  # of the draws: that of tools/compare.py, so that it gives the same intervals
THUMBNAIL = 112  # px
MOST_ROWS = 20  # of a table in the Markdown: a comment on GitHub holds 65,536 characters
MOST_PICTURES = 100  # of a system
NOTHING = "–"
MISSING = object()
SHARED = {"patients": "Patients", "pixels": "Identical images"}
LIMIT = re.compile(r"_(low|high)(?=\.|$)")
CHANGES = ("right before, now wrong", "wrong before, now right", "wrong before and now")
YES = Markup("<strong>yes</strong>")  # both in HTML and in Markdown


class Verbatim(str):
    """Text that the project did not write: escaped, and shown as code."""

    __slots__ = ()


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, and what it shows in words."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Table:
    """The heads of the columns, and rows of cells: text, `Verbatim` or `Picture`."""

    head: list[str]
    rows: list[list]


@dataclass(frozen=True)
class Side:
    """One of the two runs, as its files tell of it; what is not there is empty or None.

    ``name``: base or now. ``about``: what is known of its revision. ``params``: by dotted key.
    ``metrics``: {file: content}. ``records``: metrics/runs.json. ``confusions``: {system: actual
    and predicted of its test images}. ``curve``: plots/training.csv. ``composition``:
    metrics/audit.csv. ``lock``: {output: its digest} of dvc.lock. ``answers``: {system: predictions
    with patient_id}. ``absent``: {system: why it has none}.
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
        return fold(flatten(self.test.get(system, {})))


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
    text, is_json = path.read_text(encoding="utf-8"), path.suffix == ".json"
    content = json.loads(text) if is_json else parse_yaml(text, path.name)
    if not isinstance(content, dict):
        raise ValueError(f"no mapping, but {type(content).__name__}")
    lone = [key for key, value in content.items() if is_json and not isinstance(value, dict)]
    if lone:
        raise ValueError(f"no mapping in {lone[0]!r}")
    return content


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
    if table is None or table.empty:
        return None
    numbers = table.apply(pd.to_numeric, errors="coerce")
    return None if numbers.isna().any(axis=None) else numbers


def _digests(lock: dict) -> dict[str, str]:
    """{output: its digest} of a dvc.lock; whatever else it holds, DVC itself complains of."""
    stages = lock.get("stages")
    return {
        out["path"]: out.get("md5", "")
        for stage in (stages.values() if isinstance(stages, dict) else ())
        if isinstance(stage, dict)
        for out in stage.get("outs") or ()
        if isinstance(out, dict) and "path" in out
    }


def flatten(tree: Mapping, parents: str = "") -> dict[str, object]:
    """The leaves of nested mappings by dotted key."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{parents}{key}"
        nested = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{name}.") if nested else {name: value}
    return leaves


def fold(figures: dict[str, object]) -> dict[str, list]:
    """{key: [value, low, high]}: ``uar_low`` and ``uar_high`` are the limits of ``uar``."""
    owner = {key: LIMIT.sub("", key) for key in figures}
    lone = [key for key in figures if owner[key] == key or owner[key] not in figures]
    folded = {key: [figures[key]] for key in lone}
    for key in (key for key in figures if key not in folded):
        folded.get(owner[key], []).append(figures[key])
    return folded


def systems_of(*sides: Side) -> list[str]:
    """The systems that any of `sides` has metrics of, in the order of SYSTEMS."""
    found = {system for side in sides for system in side.test}
    return [s for s in SYSTEMS if s in found] + sorted(found - set(SYSTEMS))


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
    """Whether dvc.lock has the same content of `path` on both sides."""
    digest = base.lock.get(path.as_posix())
    return digest is not None and digest == now.lock.get(path.as_posix())


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
        if not _is_number(told) or round(found[key], 4) != round(told, 4):
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
        findings.append(Finding(system, name, beyond, said, _compared(values, difference)))
    return findings


def _judge_apart(judgement: Judgement, figures: Sequence[list]) -> tuple[bool | None, str]:
    """Without a paired interval: what the separate ones and dvc.lock tell, and that in words.

    `figures` are those of base and now, [value, low, high].
    """
    if judgement.alike:
        return False, "no difference: dvc.lock has the same predictions on both sides"
    if not judgement.same:
        return None, "cannot be judged: not known to be of the same test images"
    if not all(len(own) == 3 and all(map(_is_number, own)) for own in figures):
        return None, "cannot be judged without an interval"
    if max(low for _, low, _ in figures) > min(high for _, _, high in figures):
        return True, "more than noise: the two separate 95 % intervals do not even overlap"
    return None, "cannot be judged from two separate 95 % intervals that overlap"


def headline(findings: Sequence[Finding]) -> str:
    """The verdict in one sentence."""
    beyond = [
        f"{display_name(f.system)}: {f.figure} {f.cells[2]} points" for f in findings if f.beyond
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


def display_name(system: str) -> str:
    """As people read it; a name that this revision does not know is Verbatim."""
    return SYSTEM_NAMES.get(system, Verbatim(system))


def tabulate_verdicts(findings: Sequence[Finding]) -> Table:
    said = {True: YES, False: "no", None: "cannot be judged"}
    return Table(
        ["system", "figure", *NAMES, "difference", "95 % interval", "more than noise"],
        [[display_name(f.system), f.figure, *f.cells, said[f.beyond]] for f in findings],
    )


def _compared(figures: Sequence[list], difference: Difference | None) -> list[str]:
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
    if not figure or not all(map(_is_number, figure)):
        return NOTHING
    value, *limits = (f"{100 * x:.1f}" for x in figure)
    return f"{value} % ({' to '.join(limits)})" if limits else f"{value} %"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- Parameters and metrics ------------------------------------------------------------------


def tabulate_params(base: Side, now: Side) -> Table:
    """The parameters that differ, by dotted key."""
    rows = [
        [Verbatim(key), *map(_literal, values)]
        for key, *values in _changed(base.params, now.params)
    ]
    return Table(["parameter", *NAMES], rows)


def tabulate_metrics(file: str, base: Side, now: Side) -> Table:
    """What differs in metrics/`file`.json, what is new or gone and the largest differences first.

    Limits of an interval stand behind their value. A system of one side alone is one row.
    """
    before, after = base.metrics[file], now.metrics[file]
    lone = [
        [Verbatim(key), _counted(before.get(key)), _counted(after.get(key)),
         "new" if key in after else "gone"]
        for key in dict.fromkeys([*before, *after])
        if not (key in before and key in after)
    ]  # fmt: skip
    shared = [{key: own[key] for key in own if key in before and key in after}
              for own in (before, after)]  # fmt: skip
    rows = sorted(_changed(*map(_folded, shared)), key=lambda row: -_distance(*row[1:]))
    return Table(["figure", *NAMES, "difference"], [*lone, *(_figures(*row) for row in rows)])


def _folded(content: dict) -> dict[str, list]:
    return fold(flatten(content))


def _figures(key: str, before: list | object, after: list | object) -> list[str]:
    return [Verbatim(key), _figure(before), _figure(after), _difference(before, after)]


def _changed(base: dict[str, object], now: dict[str, object]) -> Iterator[tuple]:
    """(key, value in base, value now) of what differs; MISSING stands for none."""
    for key in dict.fromkeys([*base, *now]):
        before, after = base.get(key, MISSING), now.get(key, MISSING)
        if repr(before) != repr(after):  # a NaN is unlike itself, and 1 is like True and 1.0
            yield key, before, after


def _literal(value: object) -> str:
    if value is MISSING:
        return NOTHING
    return Verbatim(json.dumps(value, ensure_ascii=False, default=str))


def _counted(figures: dict | None) -> str:
    return NOTHING if figures is None else f"{len(_folded(figures))} figures"


def _figure(values: list | object) -> str:
    """A value, with its limits in brackets where it has them."""
    if values is MISSING:
        return NOTHING
    value, *limits = map(_plain, values)
    return f"{value} ({' to '.join(limits)})" if limits else value


def _plain(value: object) -> str:
    if not _is_number(value):
        return _literal(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _difference(before: list | object, after: list | object) -> str:
    if before is MISSING or after is MISSING:
        return "new" if before is MISSING else "gone"
    if repr(before) == repr(after) or not (_is_number(before[0]) and _is_number(after[0])):
        return ""
    difference = after[0] - before[0]
    return f"{difference:+,}" if isinstance(difference, int) else f"{difference:+.4f}"


def _distance(before: list | object, after: list | object) -> float:
    """How far two figures are apart; what has no distance comes before all that have one."""
    numbers = [side[0] for side in (before, after) if side is not MISSING and _is_number(side[0])]
    return abs(numbers[1] - numbers[0]) if len(numbers) == 2 else math.inf


# --- Answers ---------------------------------------------------------------------------------


def tabulate_confusion(tables: Sequence[pd.DataFrame | None]) -> Table:
    """How many images of each class got each answer, in base and now, where that changed."""
    counts = [None if table is None else _count(table) for table in tables]
    columns = [
        a for a in ANSWERS if a != UNPARSED or any(c[a].any() for c in counts if c is not None)
    ]

    def cell(row: str, column: str) -> str:
        before, after = (NOTHING if c is None else f"{c.loc[row, column]:,}" for c in counts)
        return before if before == after else f"{before} → {after}"

    return Table(
        ["actual", *(f"answered {ANSWERS[column]}" for column in columns)],
        [[LABEL_NAMES[row], *(cell(row, column) for column in columns)] for row in LABELS],
    )


def _count(table: pd.DataFrame) -> pd.DataFrame:
    """How many images of each of LABELS got each of ANSWERS."""
    counts = pd.crosstab(table["actual"], table["predicted"])
    return counts.reindex(index=list(LABELS), columns=list(ANSWERS), fill_value=0)


def tabulate_recalls(judgement: Judgement, base: Side, now: Side) -> Table:
    """The recall of each class, and the interval of its difference."""
    figures = [side.figures(judgement.system) for side in (base, now)]
    recall = judgement.result.recall if judgement.result else {}
    rows = [
        [LABEL_NAMES[x], *_compared([own.get(f"recall.{x}", []) for own in figures], recall.get(x))]
        for x in LABELS
    ]
    return Table(["recall of", *NAMES, "difference", "95 % interval"], rows)


def tabulate_answers(
    judgement: Judgement, base: Side, now: Side, pictures: Mapping[str, Picture] | None = None
) -> Table:
    """The test images whose answer changed, what was right and is wrong first.

    Behind an answer stand the probabilities of the classes, in the order of LABELS.
    With `pictures`, {image_id: …}, a column shows those of the first MOST_PICTURES images.
    """
    before, after = (of_test(side.answers[judgement.system]) for side in (base, now))
    unlike = before.index[before["predicted"] != after["predicted"]]
    rows = [_changed_answer(image, before.loc[image], after.loc[image]) for image in unlike]
    rows.sort(key=lambda row: (CHANGES.index(row[1]), row[0]))
    head = ["image", "change", "truth", *NAMES]
    if pictures is None or not any(image in pictures for image in unlike):
        return Table(head, rows)
    for place, row in enumerate(rows):
        row.insert(1, pictures.get(row[0], NOTHING) if place < MOST_PICTURES else NOTHING)
    return Table(["image", "picture", *head[1:]], rows)


def _changed_answer(image: str, before: pd.Series, after: pd.Series) -> list:
    truth, answers = before["actual"], (before, after)
    right = [answer["predicted"] == truth for answer in answers]
    change = CHANGES[0] if right[0] else CHANGES[1] if right[1] else CHANGES[2]
    cells = [
        f"{ANSWERS[a['predicted']]} ({' / '.join(f'{a[label]:.2f}' for label in LABELS)})"
        for a in answers
    ]
    return [Verbatim(image), change, LABEL_NAMES[truth], *cells]


def unlike_images(judgements: Sequence[Judgement], base: Side, now: Side) -> list[str]:
    """The test images that any system answered otherwise than before."""
    tables = [tabulate_answers(j, base, now) for j in judgements if j.result]
    return sorted({row[0] for table in tables for row in table.rows[:MOST_PICTURES]})


# --- Leaks, and how the runs came about ------------------------------------------------------


def tabulate_leaks(base: Side, now: Side) -> Table:
    """All figures of metrics/audit.json, whether they differ or not."""
    before, after = (_folded(side.metrics["audit"]) for side in (base, now))
    rows = [
        _figures(key, before.get(key, MISSING), after.get(key, MISSING))
        for key in dict.fromkeys([*before, *after])
    ]
    return Table(["figure", *NAMES, "difference"], rows)


def tabulate_composition(base: Side, now: Side) -> Table | None:
    """The lines of metrics/audit.csv that differ; None where a side has none."""
    if base.composition is None or now.composition is None:
        return None
    before, after = (
        {tuple(row[:3]): row[3:] for row in side.composition.to_numpy().tolist()}
        for side in (base, now)
    )
    rows = []
    for key, *counts in _changed(before, after):
        pairs = zip(*([NOTHING] * 6 if c is MISSING else c for c in counts), strict=True)
        rows.append(
            [*map(Verbatim, key), *(a if a == b else Verbatim(f"{a} → {b}") for a, b in pairs)]
        )
    return Table([column.replace("_", " ") for column in COMPOSITION], rows)


def tabulate_curves(base: Side, now: Side) -> Table:
    """What each training came to: its kept epoch, and the validation split there."""
    rows = []
    for side in (base, now):
        if side.curve is not None:
            kept = kept_epoch(side)
            last = side.curve.set_index("epoch").loc[kept]
            rows.append(
                [side.name, str(len(side.curve)), str(kept), f"{100 * last['val_uar']:.1f} %",
                 f"{100 * last['val_war']:.1f} %", f"{last['val_loss']:.4f}"]
            )  # fmt: skip
    return Table(["", "epochs", "kept epoch", "UAR there", "WAR there", "loss there"], rows)


def kept_epoch(side: Side) -> int:
    """The epoch that the run kept; where its record does not say, the one with the highest UAR."""
    epochs = side.curve["epoch"].astype(int).tolist()
    told = side.records.get(TRAINED, {}).get("best_epoch")
    return told if told in epochs else epochs[side.curve["val_uar"].idxmax()]


def tabulate_revisions(base: Side, now: Side) -> Table:
    """What Git tells of both sides."""
    rows = [[key, *(Verbatim(side.about[key]) for side in (base, now))] for key in base.about]
    return Table(["Git", *NAMES], rows)


def tabulate_runs(base: Side, now: Side) -> Table:
    """metrics/runs.json, what differs first; where systems differ, each value with its own."""
    records = [record for side in (base, now) for record in side.records.values()]
    rows = []
    for key in dict.fromkeys(key for record in records for key in record):
        values = [_told(side.records, key) for side in (base, now)]
        rows.append([Verbatim(key), *values, "" if values[0] == values[1] else YES])
    rows.sort(key=lambda row: not row[-1])
    return Table(["of the systems", *NAMES, "differs"], rows)


def _told(records: dict[str, dict], key: str) -> str:
    """What the records say of `key`: one value, or each with the systems that have it."""
    by_value: dict[str, list[str]] = {}
    for system, record in records.items():
        if key in record:
            value = record[key]
            text = value if isinstance(value, str) else _literal(value)
            by_value.setdefault(text, []).append(system)
    if len(by_value) < 2:
        return Verbatim(*by_value) if by_value else NOTHING
    return Verbatim("; ".join(f"{value} ({', '.join(own)})" for value, own in by_value.items()))


# --- Pictures --------------------------------------------------------------------------------


def draw_confusions(system: str, base: Side, now: Side) -> list[Picture]:
    """The confusion matrices of base and now; one alone where both are the same."""
    tables = {side.name: side.confusions.get(system) for side in (base, now)}
    tables = {name: table for name, table in tables.items() if table is not None}
    if len(tables) == 2 and _count(tables["base"]).equals(_count(tables["now"])):
        tables = {"base and now": tables["now"]}
    return [
        _drawn(
            lambda path, t=table, n=name: charts.draw_confusions(path, {system: t}, {system: n}),
            f"Confusion matrix of {display_name(system)}, {name}; the table below has its numbers.",
        )
        for name, table in tables.items()
    ]


def draw_curves(base: Side, now: Side) -> Picture | None:
    """The learning curves of now, over those of base; None where now has none."""
    if now.curve is None:
        return None
    return _drawn(
        lambda path: charts.draw_training(path, now.curve, kept_epoch(now), base.curve),
        "Losses, UAR and WAR on the validation split and learning rate by epoch, base dashed.",
    )


def _drawn(draw: Callable[[Path], None], alt: str) -> Picture:
    """What `draw` draws to the path that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.png"
        draw(path)
        return _embedded(path.read_bytes(), alt)


def thumbnail(image: np.ndarray, name: str) -> Picture:
    """An image, uint8 (side, side), small."""
    png = io.BytesIO()
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(png, "PNG", optimize=True)
    return _embedded(png.getvalue(), f"Image {name}")


def _embedded(png: bytes, alt: str) -> Picture:
    return Picture(f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}", alt)


# --- The report ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """All that the report says.

    ``stale``: None where DVC cannot read the pipeline; ``trouble`` then says why. ``pictures``:
    {image_id: thumbnail}; ``about_pictures``: what they show, or why there are none.
    """

    base: Side
    now: Side
    judgements: list[Judgement]
    stale: list[StaleStage] | None
    trouble: str
    pictures: dict[str, Picture]
    about_pictures: str


def render(review: Review) -> tuple[str, str, str]:
    """The report as Markdown and as HTML, and its verdict in a sentence."""
    base, now, judgements = review.base, review.now, review.judgements
    findings = {j.system: find(j, base, now) for j in judgements}
    every = [finding for own in findings.values() for finding in own]
    values = {
        "review": review,
        "base": base,
        "now": now,
        "headline": headline(every),
        "order": " / ".join(LABEL_NAMES.values()),
        "notes": notes(review),
        "verdicts": tabulate_verdicts(every),
        "judgements": judgements,
        "sentences": {j.system: tell(j, findings[j.system]) for j in judgements},
        "params": tabulate_params(base, now),
        "metrics": {file: tabulate_metrics(file, base, now) for file in METRICS},
        "confusions": {
            j.system: tabulate_confusion([s.confusions.get(j.system) for s in (base, now)])
            for j in judgements
        },
        "recalls": {j.system: tabulate_recalls(j, base, now) for j in judgements},
        "curves": tabulate_curves(base, now),
        "leaks": tabulate_leaks(base, now),
        "composition": tabulate_composition(base, now),
        "stale": Table(
            ["stage", "why"], [[Verbatim(s.name), Verbatim(s.why)] for s in review.stale or ()]
        ),
        "revisions": tabulate_revisions(base, now),
        "runs": tabulate_runs(base, now),
    }
    compared = [j for j in judgements if j.result]
    drawn = {
        "pictures": {j.system: draw_confusions(j.system, base, now) for j in judgements},
        "curve": draw_curves(base, now),
        "answers": {j.system: tabulate_answers(j, base, now, review.pictures) for j in compared},
    }
    told = {"answers": {j.system: tabulate_answers(j, base, now) for j in compared}}
    return (
        _environment(_markdown).get_template("report.md").render(values | told),
        _environment(_html).get_template("report.html").render(values | drawn),
        values["headline"],
    )


def notes(review: Review) -> list[str]:
    """What a reader of the verdict has to know first."""
    base, now = review.base, review.now
    found = []
    profiles = [side.params.get("profile", NOTHING) for side in (base, now)]
    if profiles[0] != profiles[1]:
        found.append(f"Base is of the profile {profiles[0]}, now of {profiles[1]}.")
    if profiles[1] == "phantom":
        found.append("Phantom run: the images are drawn; no figure says anything about real lungs.")
    if review.stale:
        names = ", ".join(stage.name for stage in review.stale)
        found.append(
            f"dvc.lock is not current: {names}. The figures are of other code or parameters."
        )
    shared = flatten(now.metrics["audit"])
    for what in ("patients", "pixels"):
        count = shared.get(f"audit.shared.{what}")
        if _is_number(count) and count > 0:
            found.append(f"{SHARED[what]} in more than one split: {count:,}. Figures are too good.")
    return found


def _environment(finalize: Callable) -> Environment:
    """Templates in which every value goes through `finalize`, which escapes it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"verbatim": Verbatim, "name": display_name}
    environment.filters["inert"] = lambda value: escape(printable(value))
    environment.filters["line"] = lambda cells: _line(map(finalize, cells))
    environment.filters["rule"] = lambda cells: _line("---" for _ in cells)
    environment.globals["MOST_ROWS"] = MOST_ROWS
    return environment


def _html(value: object) -> Markup:
    if isinstance(value, Picture):
        return Markup('<img src="{}" alt="{}">').format(value.uri, value.alt)
    if isinstance(value, Verbatim):
        # A long name breaks behind these, not within a word.
        return Markup("<code>{}</code>").format(_breakable(printable(value)))
    return escape(value)


def _breakable(text: str) -> Markup:
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", text))


def _markdown(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    text = printable(value)
    if isinstance(value, Picture):
        raise TypeError("the Markdown holds no picture")
    if isinstance(value, Verbatim):
        return Markup(_code_span(text))
    return Markup(re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", text))


def _line(cells: Iterable[str]) -> Markup:
    return Markup(f"| {' | '.join(cells)} |")


def _code_span(text: str) -> str:
    """`text` as code, also in a cell of a table: nothing in it is Markdown, HTML or a mention."""
    inner = text.replace("|", r"\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", inner)), default=0))
    pad = " " if inner.startswith(("`", " ")) or inner.endswith(("`", " ")) else ""
    return f"{fence}{pad}{inner}{pad}{fence}"
