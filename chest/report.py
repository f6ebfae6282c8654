"""What a reviewer reads of two runs: the report that tools/review.py writes.

It is filled twice from the same values: as Markdown for a pull request, which never holds a
picture, and as one HTML file that holds its pictures itself. Both escape what the project did not
write itself (`Verbatim`): names of revisions, sites and images, values of parameters. What a run
is, and whether two differ by more than noise, `chest.review` says.
"""

import base64
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from chest import charts
from chest.errors import printable
from chest.labels import LABEL_NAMES, LABELS, UNPARSED
from chest.review import (
    ANSWERS,
    COMPOSITION,
    METRICS,
    NAMES,
    NOTHING,
    Finding,
    Judgement,
    Side,
    cells_of,
    find,
    flatten,
    fold,
    headline,
    is_number,
    kept_epoch,
    of_test,
    tell,
)
from chest.staleness import StaleStage
from chest.systems import SYSTEM_NAMES

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 112  # px
MOST_ROWS = 20  # of a table in the Markdown: a comment on GitHub holds 65,536 characters
MOST_PICTURES = 100  # of a system
MISSING = object()
SHARED = {"patients": "Patients", "pixels": "Identical images"}
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


# --- The verdict, parameters and metrics -----------------------------------------------------


def tabulate_verdicts(findings: Sequence[Finding]) -> Table:
    """UAR and WAR of each system, and whether they differ by more than noise."""
    said = {True: YES, False: "no", None: "cannot be judged"}
    return Table(
        ["system", "figure", *NAMES, "difference", "95 % interval", "more than noise"],
        [[display_name(f.system), f.figure, *f.cells, said[f.beyond]] for f in findings],
    )


def display_name(system: str) -> str:
    """As people read it; a name that this revision does not know is Verbatim."""
    return SYSTEM_NAMES.get(system, Verbatim(system))


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
    rows = sorted(_changed(*map(fold, shared)), key=lambda row: -_distance(*row[1:]))
    return Table(["figure", *NAMES, "difference"], [*lone, *(_figures(*row) for row in rows)])


def _counted(figures: dict | None) -> str:
    return NOTHING if figures is None else f"{len(fold(figures))} figures"


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


def _figure(values: list | object) -> str:
    """A value, with its limits in brackets where it has them."""
    if values is MISSING:
        return NOTHING
    value, *limits = map(_plain, values)
    return f"{value} ({' to '.join(limits)})" if limits else value


def _plain(value: object) -> str:
    if not is_number(value):
        return _literal(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _difference(before: list | object, after: list | object) -> str:
    if before is MISSING or after is MISSING:
        return "new" if before is MISSING else "gone"
    if repr(before) == repr(after) or not (is_number(before[0]) and is_number(after[0])):
        return ""
    difference = after[0] - before[0]
    return f"{difference:+,}" if isinstance(difference, int) else f"{difference:+.4f}"


def _distance(before: list | object, after: list | object) -> float:
    """How far two figures are apart; what has no distance comes before all that have one."""
    numbers = [side[0] for side in (before, after) if side is not MISSING and is_number(side[0])]
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
        [LABEL_NAMES[x], *cells_of([own.get(f"recall.{x}", []) for own in figures], recall.get(x))]
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
    before, after = (fold(side.metrics["audit"]) for side in (base, now))
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
    for what, name in SHARED.items():
        count = shared.get(f"audit.shared.{what}")
        if is_number(count) and count > 0:
            found.append(f"{name} in more than one split: {count:,}. Figures are too good.")
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


def _code_span(text: str) -> str:
    """`text` as code, also in a cell of a table: nothing in it is Markdown, HTML or a mention."""
    inner = text.replace("|", r"\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", inner)), default=0))
    pad = " " if inner.startswith(("`", " ")) or inner.endswith(("`", " ")) else ""
    return f"{fence}{pad}{inner}{pad}{fence}"


def _line(cells: Iterable[str]) -> Markup:
    return Markup(f"| {' | '.join(cells)} |")
