"""The report of ``tools/review.py``: sections of text, tables and charts, as Markdown and as HTML.

Everything is escaped: names of revisions, sites and images come from elsewhere. The Markdown, which
a pull request shows, holds no picture; the HTML is one file that holds its pictures itself.
"""

import base64
import html
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from chest.core.errors import printable
from chest.core.labels import LABEL_NAMES, LABELS
from chest.core.tables import markdown
from chest.reporting import charts, control_tables
from chest.reporting.review import Change, Review, RunResults
from chest.reporting.staleness import StaleStage
from chest.reporting.wording import ANSWER_NAMES, compared_cells

TEMPLATES = Path(__file__).parent / "templates"
DISCLAIMER = "Research on public data: no diagnosis, no medical device, not to be used on patients."
ABOUT_DIFFERENCES = (
    "UAR is the balanced accuracy, WAR the accuracy. Differences are now minus base, in percentage"
    " points, on the same images; the paired intervals come from a bootstrap over patients. The p"
    " of the primary comparisons carries a Holm correction and decides about them; the others are"
    " exploratory: of twenty that are noise, one seems to be more."
)
ABOUT_CONTROLS = (
    "This run alone, test split. Covered is the probability that the model gives any of the"
    " answers: if it is small, it did not take the question. A prior corrects for the words that a"
    " model favours whatever it is shown."
)
THUMBNAIL = 112  # px
MOST_ROWS = 20  # of a table in Markdown: a comment on GitHub holds 65,536 characters
MOST_IMAGES = 100  # thumbnails of a table
MASKS = "masks.json"


@dataclass(frozen=True)
class Table:
    """Rows of text; ``images``, {first cell of a row: data URI}, are shown in HTML only."""

    title: str
    head: list[str]
    rows: list[list[str]]
    images: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Paragraphs, then tables, then charts as pairs of data URI and description."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)


def build(
    review: Review, stale: list[StaleStage], images: Mapping[str, str], about_images: str
) -> list[Section]:
    """Return all sections; `images` is {image_id: data URI of a thumbnail}."""
    base, now = review.base, review.now
    files = sorted({*base.metrics, *now.metrics} - {MASKS})
    metrics = [_changes(f, base.metrics.get(f, {}), now.metrics.get(f, {})) for f in files]
    return [
        _verdict(review, stale),
        _listed("Parameters that changed", [_changes("params.yaml", base.params, now.params)]),
        _listed("Metrics that changed", metrics),
        _controls(now),
        _confusions(review),
        _curves(review),
        _answers(review, images, about_images),
        _audit(base, now),
        _stale(stale),
        _origins(base, now),
    ]


# --- Sections --------------------------------------------------------------------------------


def _verdict(review: Review, stale: list[StaleStage]) -> Section:
    head = ["system", "split", "figure", "question", "more than noise", "p"]
    head += ["base", "now", "difference", "95 % interval", "half-width"]
    rows = [
        [
            *(review.name(change.system), change.split, change.figure),
            *judgement(change),
            *compared_cells(change.difference),
        ]
        for change in review.changes
    ]
    changed = {change.system for change in review.changes}
    same = dict.fromkeys(review.name(pair[0]) for pair in review.pairs if pair[0] not in changed)
    text = [
        *review.notes,
        *(["dvc.lock is not current: the figures are of other code or parameters."] * bool(stale)),
        *([f"The same answers as before: {', '.join(same)}."] if same else []),
        ABOUT_DIFFERENCES,
    ]
    return Section("Verdict", text, [Table("Differences between the two runs", head, rows)])


def judgement(change: Change) -> list[str]:
    """Return kind of question, verdict and p; Holm's correction may outweigh the interval."""
    kind, holm = ("primary", " (Holm)") if change.primary else ("exploratory", "")
    verdict = "yes" if change.beyond_noise else "no"
    if change.difference.beyond_noise and not change.beyond_noise:
        verdict = "no, after Holm's correction"
    return [kind, verdict, f"{change.p:.4f}{holm}"]


def _listed(title: str, tables: list[Table]) -> Section:
    tables = [table for table in tables if table.rows]
    return Section(title, [] if tables else ["None."], tables)


def _changes(title: str, base: Mapping, now: Mapping, every: bool = False) -> Table:
    """List the keys whose values differ, or `every` key, the largest differences first."""
    rows = []
    for key in dict.fromkeys([*base, *now]):
        before, after = base.get(key), now.get(key)
        if every or before != after:
            change = after - before if _is_number(before) and _is_number(after) else None
            rows.append([key, before, after, change])
    rows.sort(key=lambda row: -np.inf if row[3] is None else -abs(row[3]))
    cells = [[key, _cell(a), _cell(b), _cell(change, "+")] for key, a, b, change in rows]
    return Table(title, ["", "base", "now", "difference"], cells)


def _controls(now: RunResults) -> Section:
    """Show what vision-language models answer without the image, in other words, and by prior."""
    title, controls = "Do vision-language models look at the image?", now.controls
    if controls.empty:
        return Section(title, ["This run has none."])
    verdicts = [said.replace("**", "") for said in control_tables.need_image(controls, now.names)]
    priors = [
        f"{now.names[key]}: {control_tables.PRIORS[now.runs.get(f'{key}.details.prior', 'none')]}"
        for key in dict.fromkeys(controls["system"])
    ]
    about = f"{ABOUT_CONTROLS} The declared prior: {'; '.join(priors)}."
    images = [*control_tables.image_rows(controls, now.names)]
    changes = [*control_tables.change_rows(controls, now.names)]
    tables = [
        Table("With the image, without it, and by prior", control_tables.IMAGE_HEAD, images),
        Table("Answers that change", control_tables.CHANGE_HEAD, changes),
    ]
    return Section(title, [*verdicts, about], tables)


def _confusions(review: Review) -> Section:
    """Show the confusion matrices that changed."""
    tables, pictures = [], []
    for system, split, *sides in review.pairs:
        counts = [_count(table) for table in sides]
        if counts[0].equals(counts[1]):
            continue
        seen = (counts[0] + counts[1]).any()  # classes that were answered at all
        changes = counts[0].astype(str) + " → " + counts[1].astype(str)
        rows = [[ANSWER_NAMES[row[0]], *row[1:]] for row in changes.loc[:, seen].itertuples()]
        title = f"{review.name(system)}, {split}"
        tables.append(Table(title, ["actual", *(ANSWER_NAMES[x] for x in seen.index[seen])], rows))
        styles = [charts.SeriesStyle(f"{x}: {review.name(system)}") for x in ("Base", "Now")]
        drawn = [*zip(styles, [split, split], sides, strict=True)]
        picture = _drawn(lambda path, d=drawn: charts.draw_confusions(path, d))
        pictures.append((picture, f"Confusion matrices of {title}: base and now."))
    return Section("Confusion matrices", [] if tables else ["None changed."], tables, pictures)


def _count(table: pd.DataFrame) -> pd.DataFrame:
    """Count the answers of each class: index actual, columns predicted."""
    counts = pd.crosstab(table["actual"], table["predicted"])
    rows = [label for label in LABELS if label in counts.index]
    return counts.reindex(index=rows, columns=[*ANSWER_NAMES], fill_value=0)


def _curves(review: Review) -> Section:
    """Show the learning curves that changed."""
    curves = {}
    base, now = review.base.curves, review.now.curves
    for system in sorted({*base, *now}):
        sides = {"Base": base.get(system), "Now": now.get(system)}
        if None in sides.values() or not sides["Base"].table.equals(sides["Now"].table):
            curves |= {f"{k}: {review.name(system)}": curve for k, curve in sides.items() if curve}
    if not curves:
        return Section("Learning curves", ["None changed."])
    text = f"Losses and validation figures by epoch. {', '.join(curves)}."
    picture = _drawn(lambda path: charts.draw_training(path, curves))
    return Section("Learning curves", [text], [], [(picture, text)])


def _answers(review: Review, images: Mapping[str, str], about_images: str) -> Section:
    tables = []
    for system, split, before, after in review.pairs:
        changed = np.flatnonzero((before["predicted"] != after["predicted"]).to_numpy())
        rows = [_changed_answer(before.iloc[i], after.iloc[i]) for i in changed]
        if rows:
            rows.sort(key=lambda row: (row[1], row[0]))
            title = f"{review.name(system)}, {split}: {len(rows):,} changed"
            shown = {row[0]: images[row[0]] for row in rows[:MOST_IMAGES] if row[0] in images}
            tables.append(Table(title, ["image", "change", "actual", "base", "now"], rows, shown))
    order = f"In brackets the probabilities: {' / '.join(LABEL_NAMES.values())}."
    text = [order, *filter(None, [about_images])] if tables else ["None."]
    return Section("Answers that changed", text, tables)


def _changed_answer(before: pd.Series, after: pd.Series) -> list[str]:
    right = [answer["predicted"] == answer["actual"] for answer in (before, after)]
    change = "was right, is wrong" if right[0] else "was wrong, is right" if right[1] else "wrong"
    cells = [
        f"{ANSWER_NAMES[a['predicted']]} ({' / '.join(f'{a[label]:.2f}' for label in LABELS)})"
        for a in (before, after)
    ]
    return [before["image_id"], change, ANSWER_NAMES[before["actual"]], *cells]


def _audit(base: RunResults, now: RunResults) -> Section:
    """Show what the splits share, and for whom the gate of the lung masks fails."""
    leaks = _changes("metrics/audit.json", base.audit, now.audit, every=True)
    masks = [run.metrics.get(MASKS, {}) for run in (base, now)]
    return _listed("Leak audit", [leaks, _changes(f"metrics/{MASKS}", *masks, every=True)])


def _stale(stale: list[StaleStage]) -> Section:
    rows = [[stage.name, stage.reason] for stage in stale]
    text = "No. Run `dvc repro`, then commit dvc.lock, metrics/ and plots/ with the change."
    tables = [Table("Stale stages", ["stage", "why"], rows)] if stale else []
    return Section("Is dvc.lock current?", [text if stale else "Yes: no stage is stale."], tables)


def _origins(base: RunResults, now: RunResults) -> Section:
    git = _changes("Git", base.about, now.about, every=True)
    return _listed("How both came about", [git, _changes("metrics/runs.json", base.runs, now.runs)])


# --- Cells and pictures ----------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object, sign: str = "") -> str:
    if value is None:
        return "" if sign else "–"
    if _is_number(value):
        return format(value, f"{sign}.6g" if isinstance(value, float) else f"{sign},")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _drawn(draw: Callable[[Path], None]) -> str:
    """Return as a data URI what `draw` draws to the path that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.png"
        draw(path)
        return _data_uri(path.read_bytes())


def thumbnail(image: np.ndarray) -> str:
    """Return a small copy of an image, uint8 (side, side), as a data URI."""
    png = io.BytesIO()
    Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(png, "PNG")
    return _data_uri(png.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


# --- Markdown and HTML -----------------------------------------------------------------------


def to_markdown(headline: str, sections: Iterable[Section]) -> str:
    """Return the report without its pictures, long tables cut to MOST_ROWS."""
    blocks = [f"# {_escape(headline)}", DISCLAIMER]
    for section in sections:
        blocks += [f"## {section.title}", *map(_escape, section.text)]
        blocks += map(_folded, section.tables)
    return "\n\n".join(blocks) + "\n"


def _folded(table: Table) -> str:
    rows = [[_escape(cell) for cell in row] for row in table.rows[:MOST_ROWS]]
    left = len(table.rows) - len(rows)
    more = f"\n\nand {left:,} more in `report.html`" if left else ""
    text = markdown(table.head, rows) + more
    title = html.escape(printable(table.title))
    return f"<details open><summary>{title}</summary>\n\n{text}\n\n</details>"


def _escape(text: str) -> str:
    """Escape what Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", printable(text))


def to_html(headline: str, sections: Iterable[Section], title: str) -> str:
    """Return the report as one page that needs no other file and no network."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    return template.render(
        headline=headline, sections=list(sections), title=title, disclaimer=DISCLAIMER
    )
