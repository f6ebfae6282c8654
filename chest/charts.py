"""Charts and contact sheets as PNG files: the same input gives the same bytes.

They are read where a pull request shows them 430 px wide: so they are 7 inches wide, and no letter
is below 11 points. A system has the same colour and place in all of them; what looks at no lung is
hollow.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from chest.files import replacing
from chest.floors import FLOORS
from chest.labels import COLLECTION_NAMES, LABEL_NAMES, LABELS, MODALITIES, MODALITY_NAMES, UNPARSED
from chest.metrics import classification_metrics
from chest.regions import HIDDEN
from chest.scores import ALL
from chest.systems import PROBE_NAMES, SYSTEMS, TRAINED

# Of Okabe and Ito's palette, which colour-blind people tell apart, those that stand out on white.
GREY = "#767676"
COLOURS = {
    "zeroshot_qwen": "#D55E00",
    "zeroshot_siglip": "#009E73",
    TRAINED: "#0072B2",
    **dict.fromkeys(FLOORS, GREY),
}
OTHER = "#CC79A7"  # a system that has no colour of its own
FIRST, SECOND = COLOURS[TRAINED], "#E69F00"
WIDTH, DPI = 7.0, 130  # inches; dots an inch
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "xtick.color": "0.6",
    "xtick.labelcolor": "black",
    "ytick.color": "0.6",
    "ytick.labelcolor": "black",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.labelsize": 11,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a hospital's name is no formula
}
LINE = 0.2  # inches that a line of text takes

NAMES = {**LABEL_NAMES, UNPARSED: "Unparsed"}
# Where UAR is taken, and the classes that are told apart there.
WITHIN = {
    ALL: ("All images:\none of three\nclasses", LABELS),
    "ct": ("Within CT:\nCOVID-19\nor normal", ("covid19", "normal")),
    "xray": ("Within X-ray:\ntuberculosis\nor normal", ("tuberculosis", "normal")),
}
BAND = "0.95"  # behind hollow marks
LUNGLESS = ("lungs_hidden", "border_only")
INTERVAL_NOTE = "Line: 95 % interval, bootstrap over patients. Dashed: chance."

SHEET_COLUMNS = 4
MISTAKES, MISTAKE_COLUMNS = 18, 3


def draw_confusions(
    path: Path, answers: Mapping[str, pd.DataFrame], names: Mapping[str, str]
) -> None:
    """One confusion matrix for each system, two a row: rows actual, columns predicted.

    `answers` are tables with the columns actual and predicted; `names` what a system is called.
    A cell shows its share of the row, and how many images that are. Floors come last, in grey.
    """
    models = [s for s in _in_order(answers, SYSTEMS) if s not in FLOORS]
    floors = [s for s in FLOORS if s in answers]
    rows = [part[k : k + 2] for part in (models, floors) for k in range(0, len(part), 2)]
    columns = max(len(row) for row in rows)
    unparsed = any((table["predicted"] == UNPARSED).any() for table in answers.values())
    height = (4.6 if unparsed else 4.2) * len(rows) + 0.3
    note = "Each row: share of the class, and number of images." + _floor_note(answers)
    with _drawing(path, height, note=note, width=WIDTH / 2 * columns) as figure:
        grid = figure.add_gridspec(len(rows), 2 * columns)
        for i, row in enumerate(rows):
            for k, system in enumerate(row):
                start = columns - len(row) + 2 * k  # one alone stands in the middle
                axes = figure.add_subplot(grid[i, start : start + 2])
                _confusion(axes, answers[system], names[system], _colour(system))


def _confusion(axes: Axes, table: pd.DataFrame, name: str, colour: str) -> None:
    rows = [label for label in LABELS if (table["actual"] == label).any()]
    columns = [*LABELS, UNPARSED] if (table["predicted"] == UNPARSED).any() else list(LABELS)
    counts = pd.crosstab(table["actual"], table["predicted"])
    counts = counts.reindex(index=rows, columns=columns, fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0).to_numpy()
    scale = LinearSegmentedColormap.from_list(name, ["white", colour])
    axes.imshow(shares, cmap=scale, vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        text, ink = f"{_percent(share, 0)}\n{counts.iat[i, j]:,}", _ink(scale(share))
        axes.text(j, i, text, ha="center", va="center", color=ink)
    axes.set_xticks(range(len(columns)), [NAMES[label] for label in columns])
    axes.set_yticks(
        range(len(rows)), [f"{NAMES[label]}\nn = {counts.loc[label].sum():,}" for label in rows],
        rotation=90, va="center", ma="center",
    )  # fmt: skip
    if len(columns) > len(LABELS):
        axes.tick_params("x", rotation=30)
    axes.tick_params(length=0)
    axes.set(xlabel="Predicted", ylabel="Actual")
    metrics = classification_metrics(table["actual"], table["predicted"])
    numbers = f"UAR {_percent(metrics['uar'])}   WAR {_percent(metrics['war'])}"
    axes.set_title(f"{_wrap(name, 30)}\n{numbers}\nn = {len(table):,}")


def _ink(colour: Sequence[float]) -> str:
    """What is read best on `colour` (red, green, blue, …, from 0 to 1): black or white.

    By relative luminance, as the Web Content Accessibility Guidelines 2.2 take it.
    """
    luminance = np.dot([0.2126, 0.7152, 0.0722], np.asarray(colour[:3]) ** 2.2)
    return "black" if luminance > 0.18 else "white"


@dataclass(frozen=True)
class Mark:
    """A row of the interval panels: what it is called, its colour, and whether it is hollow."""

    name: str
    colour: str
    hollow: bool


@dataclass(frozen=True)
class Panel:
    """One of the interval panels: ``rows`` has value, low and high, indexed by the marks' keys."""

    heading: str
    rows: pd.DataFrame
    chance: float


def draw_recalls(path: Path, recalls: pd.DataFrame, names: Mapping[str, str]) -> None:
    """The recall of each class with its interval: a panel a class, a row a system.

    `recalls` has the columns system, class, recall, low, high, n, bar.
    """
    panels = [
        Panel(
            f"{NAMES[label]}\nn = {rows['n'].max():,}",
            rows.set_index("system").rename(columns={"recall": "value"}),
            1 / len(LABELS),
        )
        for label, rows in _groups(recalls, "class", LABELS)
    ]
    marks = _systems(recalls, names)
    _draw_intervals(path, "Recall of each class, test split", _floor_note(marks), panels, marks)


def draw_uars(path: Path, uars: pd.DataFrame, names: Mapping[str, str]) -> None:
    """UAR with its interval, over all images and within each modality: a row a system.

    `uars` has the columns system, within (all, ct or xray), uar, low, high, n, bar.
    """
    title = "UAR (mean of the classes' recalls), test split"
    marks = _systems(uars, names)
    _draw_intervals(path, title, _floor_note(marks), _uar_panels(uars, "system"), marks)


def draw_probes(path: Path, probes: pd.DataFrame, name: str) -> None:
    """UAR of the system called `name` where a part of each image is hidden: a row a probe.

    `probes` has the columns probe, within (all, ct or xray), uar, low, high, n, bar.
    """
    marks = {
        probe: Mark(PROBE_NAMES[probe], FIRST, probe in LUNGLESS)
        for probe in _in_order(probes["probe"], PROBE_NAMES)
    }
    title = "A model that still answers with the lungs hidden has learned the scanner"
    note = f"\nHollow: the lungs are hidden.\nUAR of {name}, test split."
    _draw_intervals(path, title, note, _uar_panels(probes, "probe"), marks)


def _systems(table: pd.DataFrame, names: Mapping[str, str]) -> dict[str, Mark]:
    return {
        system: Mark(names[system], _colour(system), system in FLOORS)
        for system in _in_order(table["system"], SYSTEMS)
    }


def _floor_note(systems: Iterable[str]) -> str:
    return "\nGrey: floors, which look at no image." if set(systems) & set(FLOORS) else ""


def _uar_panels(table: pd.DataFrame, key: str) -> list[Panel]:
    return [
        Panel(
            f"{WITHIN[within][0]}\nn = {rows['n'].max():,}",
            rows.set_index(key).rename(columns={"uar": "value"}),
            1 / len(WITHIN[within][1]),
        )
        for within, rows in _groups(table, "within", WITHIN)
    ]


def _draw_intervals(
    path: Path, title: str, note: str, panels: Sequence[Panel], marks: Mapping[str, Mark]
) -> None:
    """`panels` side by side, a row for each of `marks`, the values printed above them.

    The values of hollow ones are lines through all rows: so each row is seen beside them.
    """
    height = 0.58 * len(marks) + LINE * panels[0].heading.count("\n") + 1.1
    with _drawing(path, height, title, INTERVAL_NOTE + note) as figure:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            _interval_panel(axes, panel, marks)
        labels = [_wrap(mark.name, 21) for mark in marks.values()]
        grid[0].set_yticks(range(len(marks)), labels)
        grid[0].set_ylim(len(marks) - 0.5, -0.6)


def _interval_panel(axes: Axes, panel: Panel, marks: Mapping[str, Mark]) -> None:
    for place, (key, mark) in enumerate(marks.items()):
        if mark.hollow:
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)
        if key in panel.rows.index:
            _interval(axes, place, *panel.rows.loc[key, ["value", "low", "high"]], mark)
    axes.axvline(panel.chance, color="0.3", linestyle="--", linewidth=1, zorder=1)
    axes.set_title(panel.heading)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)


def _interval(axes: Axes, place: int, value: float, low: float, high: float, mark: Mark) -> None:
    ground = BAND if mark.hollow else "white"
    if mark.hollow:
        axes.axvline(value, color="0.8", linewidth=1, zorder=1)
    axes.plot([low, high], [place, place], color=mark.colour, linewidth=2)
    face = "white" if mark.hollow else mark.colour
    axes.plot(value, place, "o", color=mark.colour, markerfacecolor=face, markersize=7)
    side = "left" if value < 0.2 else "right" if value > 0.8 else "center"
    axes.annotate(
        _percent(value), (value, place), (0, 6), textcoords="offset points", ha=side,
        path_effects=[withStroke(linewidth=3, foreground=ground)],
    )  # fmt: skip


def draw_reliability(path: Path, bins: pd.DataFrame, name: str) -> None:
    """How often answers of a given confidence are right, above how many answers there are.

    `bins` is of `chest.calibration.reliability`: low, high, n, confidence, accuracy. A point's area
    goes with n.
    """
    title = f"Do the probabilities mean what they say?\n{name}, test split"
    with _drawing(path, 6.2, title) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _accuracies(upper, bins)
        bars = lower.bar(
            bins["low"], bins["n"], bins["high"] - bins["low"], align="edge", color=FIRST,
            edgecolor="white",
        )  # fmt: skip
        lower.bar_label(bars, [f"{n:,}" for n in bins["n"]], padding=1)
        lower.set(xlabel="Probability of the answer", ylabel="Answers", yticks=[])
        lower.set_xlim(min(1 / len(LABELS), bins["low"].min()) - 0.02, 1)
        lower.xaxis.set_major_formatter(_percent_tick)


def _accuracies(axes: Axes, bins: pd.DataFrame) -> None:
    confidence, accuracy, n = bins["confidence"], bins["accuracy"], bins["n"]
    axes.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
    axes.vlines(confidence, confidence, accuracy, FIRST, alpha=0.5)
    area = 25 + 200 * n / n.max()
    axes.scatter(confidence, accuracy, area, FIRST, zorder=3, clip_on=False)
    grey = {"transform": axes.transAxes, "color": "0.4"}
    axes.text(0.02, 0.98, "Right more often than it says", va="top", **grey)
    axes.text(0.98, 0.02, "Surer than it should be", ha="right", **grey)
    axes.set(ylabel="Share that is right", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(_percent_tick)


def draw_training(
    path: Path, curve: pd.DataFrame, best_epoch: int, before: pd.DataFrame | None = None
) -> None:
    """Losses, validation UAR and WAR, and learning rate by epoch; the best epoch is marked.

    `curve` has the columns epoch, train_loss, val_loss, learning_rate, val_uar and val_war; so has
    `before`, another run to compare with, drawn dashed.
    """
    with _drawing(path, 7.2, "Training, epoch by epoch") as figure:
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
        _curves(panels[0], curve, before, {"train_loss": "training", "val_loss": "validation"})
        _curves(panels[1], curve, before, {"val_uar": "UAR", "val_war": "WAR"})
        _curves(panels[2], curve, before, {"learning_rate": ""})
        for axes in panels:
            axes.axvline(best_epoch, color="0.3", linestyle=":", linewidth=1.5)
        panels[0].set(title="Cross-entropy", ylim=(0, None))
        panels[1].set_title("Validation split")
        panels[1].yaxis.set_major_formatter(_percent_tick)
        panels[2].set(title="Learning rate", xlabel="Epoch")
        panels[2].yaxis.set_major_formatter("{x:g}")
        panels[2].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        lines = [Line2D([], [], color="0.3", linestyle=":", label=f"kept: epoch {best_epoch}")]
        if before is not None:
            lines.append(Line2D([], [], color="0.3", linestyle="--", label="base"))
        figure.legend(handles=lines, loc="outside lower right", ncols=2)


def _curves(
    axes: Axes, curve: pd.DataFrame, before: pd.DataFrame | None, columns: Mapping[str, str]
) -> None:
    """The `columns` of both runs: {column: label}."""
    styles = ((FIRST, "o"), (SECOND, "s"))
    for (column, label), (colour, marker) in zip(columns.items(), styles, strict=False):
        own = axes.plot(curve["epoch"], curve[column], color=colour, label=label, clip_on=False)
        if len(curve) <= 30:
            own[0].set(marker=marker, markersize=4)
        if before is not None:
            axes.plot(before["epoch"], before[column], "--", color=colour, linewidth=1.3)
    axes.margins(x=0.01)
    if len(columns) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def draw_contact_sheet(path: Path, images: np.ndarray, table: pd.DataFrame, note: str) -> None:
    """Pictures of each class of each collection, spread evenly over its sites and patients.

    `images` is uint8, (N, side, side), `table` has a row for each: label, collection, site,
    patient_id. `note` is printed above.
    """
    groups = list(table.reset_index(drop=True).groupby(["collection", "label"], sort=True))
    chosen = [_spread(rows, SHEET_COLUMNS) for _, rows in groups]
    sites = [[_wrap(site, 18) for site in rows["site"]] for rows in chosen]
    heights = [2.15 + LINE * _lines(row) for row in sites]
    with _drawing(path, sum(heights) + 0.4, note) as figure:
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, ((collection, label), rows), shown, captions in zip(
            parts, groups, chosen, sites, strict=True
        ):
            patients = f"{len(rows):,} images, {rows['patient_id'].nunique():,} patients"
            heading = f"{NAMES[label]}, {COLLECTION_NAMES[collection]}: {patients}"
            part.suptitle(heading, x=0.01, ha="left", size=11)
            panels = _picture_panels(part, 1, SHEET_COLUMNS)
            for panel, row, caption in zip(panels, shown.index, captions, strict=False):
                _show(panel, images[row])
                panel.set_xlabel(caption)


def draw_mistakes(path: Path, images: np.ndarray, mistakes: pd.DataFrame, title: str) -> None:
    """The first 18 of `mistakes`: what each shows, what was answered, and how surely.

    `mistakes` has the columns row (of `images`, uint8, (N, side, side)), image_id, actual,
    predicted, site, probability (of the answer) and truth (the probability of the actual class).
    """
    shown = mistakes.head(MISTAKES)
    lines = -(-len(shown) // MISTAKE_COLUMNS)
    more = f" The {len(shown)} worst." if len(shown) < len(mistakes) else ""
    captions = [
        f"{_shorten(mistake.image_id, 24)}\n{_wrap(mistake.site, 24)}"
        for mistake in shown.itertuples()
    ]
    height = (2.4 + LINE * (2 + _lines(captions))) * lines
    with _drawing(path, height + 0.6, title + more) as figure:
        panels = _picture_panels(figure, max(1, lines), MISTAKE_COLUMNS)
        if shown.empty:
            panels[0].set_title("No mistakes.")
        for panel, mistake, caption in zip(panels, shown.itertuples(), captions, strict=False):
            _show(panel, images[mistake.row])
            sure = "" if np.isnan(mistake.probability) else f" {_percent(mistake.probability, 0)}"
            panel.set_title(
                f"truth: {NAMES[mistake.actual]} {_percent(mistake.truth, 0)}\n"
                f"said: {NAMES[mistake.predicted]}{sure}"
            )
            panel.set_xlabel(caption)


def draw_probe_regions(
    path: Path,
    images: np.ndarray,
    table: pd.DataFrame,
    note: str,
    visible: Mapping[str, np.ndarray],
) -> None:
    """What each probe leaves visible of an image: a row for each modality, a column a probe.

    `images` is uint8, (N, side, side); `table` has a row for each: modality; `visible` is
    {probe: bool, (side, side)}. `note` is printed above.
    """
    side = images.shape[-1]
    regions = {"everything": np.ones((side, side), bool), **visible}
    probes = _in_order(regions, PROBE_NAMES)
    groups = _groups(table.reset_index(drop=True), "modality", MODALITIES)
    title = f"What each probe leaves visible.\n{note}"
    with _drawing(path, 1.75 * len(groups) + 0.8, title) as figure:
        panels = _picture_panels(figure, len(groups), len(probes)).reshape(len(groups), -1)
        for line, (modality, rows) in zip(panels, groups, strict=True):
            image = images[rows.index[len(rows) // 2]]
            line[0].set_ylabel(MODALITY_NAMES[modality])
            for panel, probe in zip(line, probes, strict=True):
                _show(panel, np.where(regions[probe], image, round(HIDDEN * 255)))
        for panel, probe in zip(panels[0], probes, strict=True):
            panel.set_title(_wrap(PROBE_NAMES[probe], 14))


@contextmanager
def _drawing(
    path: Path, height: float, title: str = "", note: str = "", width: float = WIDTH
) -> Iterator[Figure]:
    """A figure of `width` x `height` inches in the common style, saved to `path` at the end."""
    # Whatever style a user has set: the same bytes on every machine.
    with matplotlib.style.context(["default", STYLE]):
        title, note = _wrap(title, round(8.5 * width)), _wrap(note, round(10.5 * width))
        height += LINE * (title + note).count("\n")
        figure = Figure(figsize=(width, height), layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", color="0.3")
        yield figure
        _save(figure, path)


def _picture_panels(figure: Figure | SubFigure, rows: int, columns: int) -> np.ndarray:
    """Empty panels for pictures: Axes, (rows * columns,)."""
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set(xticks=[], yticks=[], anchor="N")  # space that is left comes below
        panel.spines[:].set_visible(False)
    return panels


def _show(panel: Axes, image: np.ndarray) -> None:
    panel.imshow(image, cmap="gray", vmin=0, vmax=255)


def _spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` of `rows`, evenly spread over sites and patients."""
    rows = rows.sort_values(["site", "patient_id"], kind="stable")
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows.iloc[np.unique(places.round().astype(int))]


def _groups(
    table: pd.DataFrame, column: str, order: Iterable[str]
) -> list[tuple[str, pd.DataFrame]]:
    """(value, rows) for each value of `column`, in `order`."""
    return [(value, table[table[column] == value]) for value in _in_order(table[column], order)]


def _in_order(found: Iterable[str], order: Iterable[str]) -> list[str]:
    """The values of `found`, each once: those of `order` first and in that order."""
    found = dict.fromkeys(found)
    known = [value for value in order if value in found]
    return known + [value for value in found if value not in known]


def _colour(system: str) -> str:
    return COLOURS.get(system, OTHER)


def _percent(share: float, places: int = 1) -> str:
    return f"{100 * share:.{places}f} %"


def _percent_tick(share: float, _: int) -> str:
    return f"{100 * share:g} %"


def _wrap(text: str, width: int) -> str:
    """`text` in the fewest lines of at most `width` letters, and those about equally long.

    Where a name has several, what stands in brackets at its end begins one.
    """
    if len(text) > width and text.endswith(")"):
        text = text.replace(" (", "\n(")
    return "\n".join(line for part in text.split("\n") for line in _balanced(part, width))


def _balanced(text: str, width: int) -> list[str]:
    longest = max(map(len, text.split()), default=1)
    widths = range(min(longest, width), width + 1)
    tried = [textwrap.wrap(text, w, break_on_hyphens=False) for w in widths]
    return next(lines for lines in tried if len(lines) == len(tried[-1]))


def _lines(texts: Iterable[str]) -> int:
    """How many lines the longest of `texts` has."""
    return max((text.count("\n") + 1 for text in texts), default=0)


def _shorten(text: str, length: int) -> str:
    """`text` without its middle, where it is too long: its ends tell more."""
    kept = (length - 1) // 2
    return text if len(text) <= length else f"{text[:kept]}…{text[-kept:]}"


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        # Without the library's version, so that the same chart gives the same bytes.
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})
