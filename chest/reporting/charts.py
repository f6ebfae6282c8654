"""Charts of a run as PNG files.

A system has the same colour and place in all charts; blind baselines are grey and hollow.
"""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, NullFormatter

from chest.core.labels import (
    DISEASES,
    LABEL_NAMES,
    LABELS,
    MODALITY_NAMES,
    UNPARSED,
)
from chest.data.regions import VISIBLE, VISIBLE_NAMES
from chest.evaluation import few_shots
from chest.evaluation.control_scores import BLIND
from chest.evaluation.controls import ASKED
from chest.evaluation.metrics import classification_metrics
from chest.reporting.drawing import (
    COLOURS,
    GREY,
    LINE,
    WIDTH,
    count_lines,
    drawing,
    percent_tick,
    wrap,
)
from chest.reporting.wording import (
    ANSWER_NAMES,
    CONDITION_NAMES,
    WITHIN,
    capitalize,
    name_layer,
    percent,
)

BAND = "0.95"  # background of hollow marks
CLASS_COLOURS = {"normal": "#009E73", "covid19": "#D55E00", "tuberculosis": "#0072B2"}
SPLIT_NAMES = {"test": "Test split", "external": "External sites"}
COUNTED = {"test": "n =", "external": "external:"}
# Validation figures of a training curve; each but WAR may select the epoch.
CURVES = {"within": "UAR within modality", "uar": "UAR", "war": "WAR", "worst": "lowest recall"}
OPAQUE = {"frameon": True, "framealpha": 1, "edgecolor": "white"}


@dataclass(frozen=True)
class SeriesStyle:
    """How a system, or a row of a chart, is called and drawn."""

    name: str
    colour: str = COLOURS[0]
    hollow: bool = False


@dataclass(frozen=True)
class TrainingCurve:
    """Losses and validation figures by epoch (`predictions.CURVE_COLUMNS`).

    ``kept`` is the epoch that was kept, and ``select_by`` the figure that selected it (a key of
    CURVES), if they are known.
    """

    table: pd.DataFrame
    kept: int | None = None
    select_by: str | None = None

    @classmethod
    def of(cls, table: pd.DataFrame, details: Mapping) -> "TrainingCurve":
        """Return a curve with what the system's record tells in ``details``."""
        return cls(table, details.get("best_epoch"), details.get("select_by"))


def palette(names: Mapping[str, str], blind: Iterable[str]) -> dict[str, SeriesStyle]:
    """Return the style of each system in `names` ({key: name}); `blind` are keys of baselines."""
    colours, blind = itertools.cycle(COLOURS), set(blind)
    return {
        key: SeriesStyle(name, GREY, hollow=True)
        if key in blind
        else SeriesStyle(name, next(colours))
        for key, name in names.items()
    }


def draw_confusions(path: Path, answers: Sequence[tuple[SeriesStyle, str, pd.DataFrame]]) -> None:
    """Draw confusion matrices, two in a row: actual classes down, predicted ones across.

    `answers` are tuples (style, split, table with the columns actual and predicted). A cell shows
    its share of the row and the number of images.
    """
    columns, rows = min(2, len(answers)), -(-len(answers) // 2)
    unparsed = any((table["predicted"] == UNPARSED).any() for _, _, table in answers)
    height = (4.3 if unparsed else 3.9) * rows + 0.3
    note = "Share of each row, and number of images."
    with drawing(path, height, note=note, width=WIDTH / 2 * columns) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (style, split, table) in zip(panels, answers, strict=False):
            _confusion(axes, table, style, split)
        for axes in panels[len(answers) :]:
            axes.set_axis_off()


def _confusion(axes: Axes, table: pd.DataFrame, style: SeriesStyle, split: str) -> None:
    rows = [label for label in LABELS if (table["actual"] == label).any()]
    columns = [*LABELS, UNPARSED] if (table["predicted"] == UNPARSED).any() else list(LABELS)
    counts = pd.crosstab(table["actual"], table["predicted"])
    counts = counts.reindex(index=rows, columns=columns, fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0).to_numpy()
    scale = LinearSegmentedColormap.from_list("shares", ["white", style.colour])
    axes.imshow(shares, cmap=scale, vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        text, ink = f"{percent(share, 0)}\n{counts.iat[i, j]:,}", _ink(scale(share))
        axes.text(j, i, text, ha="center", va="center", color=ink)
    labels = [f"{ANSWER_NAMES[label]}\nn = {counts.loc[label].sum():,}" for label in rows]
    axes.set_yticks(range(len(rows)), labels, rotation=90, va="center", ma="center")
    axes.set_xticks(range(len(columns)), [ANSWER_NAMES[label] for label in columns])
    if len(columns) > len(LABELS):
        axes.tick_params("x", rotation=30)
    axes.tick_params(length=0)
    axes.set(xlabel="Predicted", ylabel="Actual")
    metrics = classification_metrics(table["actual"], table["predicted"])
    numbers = f"UAR {percent(metrics['uar'])}   WAR {percent(metrics['war'])}"
    axes.set_title(f"{wrap(style.name, 30)}\n{SPLIT_NAMES[split]}, n = {len(table):,}\n{numbers}")


def _ink(colour: Sequence[float]) -> str:
    """Return black or white, whichever reads better on `colour`, by relative luminance (WCAG)."""
    luminance = np.dot([0.2126, 0.7152, 0.0722], np.asarray(colour[:3]) ** 2.2)
    return "black" if luminance > 0.18 else "white"


def draw_recalls(path: Path, recalls: pd.DataFrame, styles: Mapping[str, SeriesStyle]) -> None:
    """Draw the recall of each class: a panel per class, a row per system.

    `recalls` has the columns system, split, class, recall, low, high, n.
    """
    table = recalls.rename(columns={"system": "row", "class": "panel", "recall": "value"})
    panels = {label: (LABEL_NAMES[label], 1 / len(LABELS)) for label in LABELS}
    _draw_intervals(path, "Recall of each class", table, panels, styles)


def draw_uars(
    path: Path,
    uars: pd.DataFrame,
    styles: Mapping[str, SeriesStyle],
    baselines: Mapping[str, float],
) -> None:
    """Draw UAR over all images and within each modality: a row per system.

    `uars` has the columns system, split, within (keys of WITHIN), uar, low, high, n. `baselines` is
    {within: UAR on test of the blind baseline that was chosen on validation}.
    """
    table = uars.rename(columns={"system": "row", "within": "panel", "uar": "value"})
    _draw_intervals(path, "UAR (balanced accuracy)", table, _uar_panels(), styles, baselines)


def draw_probes(path: Path, probes: pd.DataFrame, baselines: Mapping[str, float]) -> None:
    """Draw the UAR of the models trained on a part of each image, beside a blind baseline.

    `probes` has the columns probe, split, within, uar, low, high, n; `baselines` is that of
    `draw_uars`.
    """
    table = probes.rename(columns={"probe": "row", "within": "panel", "uar": "value"})
    rows = {region: SeriesStyle(VISIBLE_NAMES[region]) for region in VISIBLE}
    title = "UAR (balanced accuracy) of a linear model\ntrained and tested on one region"
    _draw_intervals(path, title, table, _uar_panels(), rows, baselines)


def draw_controls(path: Path, controls: pd.DataFrame, styles: Mapping[str, SeriesStyle]) -> None:
    """Draw the UAR of vision-language models with the image, without it, and with another one.

    `controls` is a table of `scores.control_table`.
    """
    shown = controls[controls["condition"].isin([ASKED, *BLIND])]
    table = _rename_uars(shown, shown["system"] + "/" + shown["condition"])
    rows = {}
    for key in dict.fromkeys(shown["system"]):
        rows[f"{key}/{ASKED}"] = styles[key]
        for condition in BLIND:
            name = CONDITION_NAMES[condition]
            rows[f"{key}/{condition}"] = replace(styles[key], name=name, hollow=True)
    title = "UAR (balanced accuracy) with the image,\nwithout it, and with another patient's"
    _draw_intervals(path, title, table, _within_panels(), rows)


def draw_layers(
    path: Path,
    layers: pd.DataFrame,
    uars: pd.DataFrame,
    styles: Mapping[str, SeriesStyle],
    baselines: Mapping[str, float],
) -> None:
    """Draw what a probe reads from each layer of a vision-language model, above what it answers.

    `layers` is a table of `read_layers`; `uars`, `styles` and `baselines` are those of `draw_uars`.
    """
    systems = [key for key in styles if key in set(layers["system"])]
    probed = _rename_uars(layers.assign(split="test"), layers["system"] + "/" + layers["layer"])
    answered = uars[uars["system"].isin(systems) & (uars["split"] == "test")]
    answered = answered.rename(columns={"system": "row", "within": "panel", "uar": "value"})
    rows = {}
    for key in systems:
        names = dict.fromkeys(layers.loc[layers["system"] == key, "layer"])
        rows |= {f"{key}/{x}": SeriesStyle(name_layer(x), GREY) for x in names}
        rows[key] = replace(styles[key], name=f"Answers: {styles[key].name}")
    title = "UAR (balanced accuracy) of a linear probe\nalong the way to the answer"
    table = pd.concat([probed, answered])
    _draw_intervals(path, title, table, _within_panels(), rows, baselines)


def _rename_uars(table: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """Return a table of UARs by modality as `_draw_intervals` takes it, with the keys `rows`."""
    names = {"modality": "panel", "uar": "value", "uar_low": "low", "uar_high": "high"}
    return table.rename(columns=names).assign(row=rows)


def draw_across(path: Path, across: pd.DataFrame) -> None:
    """Draw how far the probes carry from one hospital to another: a row per region.

    `across` is a table of `probes.score_across`. Of each modality the two sites with most test
    images are drawn, in four panels: within each, and from each to the other. Without two
    sites of a modality nothing is drawn.
    """
    lines = [pair for modality in MODALITY_NAMES if (pair := _largest_pair(across, modality))]
    if not lines:
        return
    regions = [region for region in VISIBLE if region in set(across["region"])]
    labels = [wrap(VISIBLE_NAMES[region], 12) for region in regions]
    title = "What a linear model learns from one region,\nwithin a hospital and across"
    note = "In per cent. Circle: AUROC. Diamond: UAR at the threshold of the training hospital."
    note += "\nBar: 95 % interval over patients. Dashed: chance."
    lowest = across[["auroc_low", "uar_low"]].min(axis=None)
    start = min(0.3, np.floor(10 * lowest) / 10)
    height = (0.8 * len(regions) + 1.3) * len(lines) + 1.2
    with drawing(path, height, title, note) as figure:
        grid = figure.subplots(len(lines), 4, sharey=True, squeeze=False)
        for line, pair in zip(grid, lines, strict=True):
            for axes, (trained, tested) in zip(line, pair, strict=True):
                own = (across["trained_on"] == trained) & (across["tested_on"] == tested)
                _across_panel(axes, across[own], regions)
                axes.set_xlim(start - 0.04, 1.04)
                axes.set_title(_transfer_title(trained, tested, across[own]))
            line[0].set_yticks(range(len(regions)), labels)
            line[0].set_ylim(len(regions) - 0.4, -0.6)


def _largest_pair(across: pd.DataFrame, modality: str) -> list[tuple[str, str]]:
    """Return [(A, A), (B, B), (A, B), (B, A)] of the two sites with most test images, or []."""
    own = across[across["modality"] == modality]
    found = {*zip(own["trained_on"], own["tested_on"], strict=True)}
    images = own.groupby("tested_on")["n"].max().sort_values(ascending=False, kind="stable")
    trained = [site for site in images.index if site in set(own["trained_on"])]
    pairs = [
        [(a, a), (b, b), (a, b), (b, a)] for i, a in enumerate(trained) for b in trained[i + 1 :]
    ]
    return next((pair for pair in pairs if {*pair} <= found), [])


def _transfer_title(trained: str, tested: str, rows: pd.DataFrame) -> str:
    a, b = (textwrap.shorten(site, 24, placeholder="…") for site in (trained, tested))
    place = f"Within\n{a}" if trained == tested else f"{a}\nto {b}"
    return f"{wrap(place, 14)}\nn = {rows['n'].max():,}"


def _across_panel(axes: Axes, rows: pd.DataFrame, regions: Sequence[str]) -> None:
    for row in rows.itertuples():
        place = regions.index(row.region)
        own = {"auroc": (-0.13, "test", COLOURS[0]), "uar": (0.13, "external", COLOURS[1])}
        for name, (shift, split, colour) in own.items():
            value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
            mark = pd.Series({"value": value, "low": low, "high": high, "split": split})
            _interval(axes, place + shift, mark, SeriesStyle(name, colour))
    axes.axvline(0.5, color="0.3", linestyle="--", linewidth=1, zorder=1)
    axes.set_xticks([0.5, 0.75, 1], ["50", "75", "100"])
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)


def draw_few_shots(path: Path, curves: pd.DataFrame) -> None:
    """Draw UAR against patients per class: a panel per modality, a line per encoder and method.

    `curves` is a table of `few_shots.read_curves`.
    """
    modalities = [key for key in MODALITY_NAMES if key in set(curves["modality"])]
    encoders = list(dict.fromkeys(curves["encoder"]))
    note = "Band: standard deviation of the draws of patients. Dashed: chance. The last mark: all"
    note += " training patients, at the number of the smaller class."
    title = "UAR of frozen features by patients per class"
    legend = 1.3 * LINE * len(encoders) * len(few_shots.METHODS)
    with drawing(path, 4.2 + legend, title, note) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.6, legend])
        grid = upper.subplots(1, len(modalities), sharey=True, squeeze=False)[0]
        for axes, modality in zip(grid, modalities, strict=True):
            _learning_curves(axes, curves[curves["modality"] == modality], encoders)
            disease = LABEL_NAMES[DISEASES[modality]]
            axes.set_title(f"{capitalize(WITHIN[modality])}:\n{disease} or normal")
        grid[0].yaxis.set_major_formatter(percent_tick)
        lower.legend(*grid[0].get_legend_handles_labels(), loc="center left")


def _learning_curves(axes: Axes, curves: pd.DataFrame, encoders: Sequence[str]) -> None:
    for method, encoder in itertools.product(few_shots.METHODS, encoders):
        own = curves[(curves["encoder"] == encoder) & (curves["method"] == method)]
        own = own.sort_values("per_class")
        colour = COLOURS[encoders.index(encoder) % len(COLOURS)]
        dashed = method == "prototypes"
        name = f"{encoder}, {few_shots.METHODS[method]}"
        style = {"color": colour, "linestyle": ":" if dashed else "-", "label": name}
        axes.plot(own["per_class"], own["uar"], marker="o", markersize=4, **style)
        limits = own["uar"] - own["sd"], own["uar"] + own["sd"]
        axes.fill_between(own["per_class"], *limits, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0.5, color="0.3", linestyle="--", linewidth=1)
    largest = curves["per_class"].max()
    ticks = [n for n in (1, 4, 16, 64) if n < 0.7 * largest]
    axes.set_xscale("log", base=2)
    axes.set_xticks([*ticks, largest], [*map(str, ticks), f"all\n{largest:,.0f}"])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Patients per class")


def _uar_panels() -> dict[str, tuple[str, float]]:
    """Return {key of WITHIN: (heading, UAR of an answer at random)}."""
    panels = {"all": (f"{capitalize(WITHIN['all'])}:\nthree classes", 1 / len(LABELS))}
    for modality, disease in DISEASES.items():
        name = capitalize(WITHIN[modality])
        panels[modality] = (f"{name}:\n{LABEL_NAMES[disease]}\nor normal", 1 / 2)
    return panels


def _within_panels() -> dict[str, tuple[str, float]]:
    """Return the panels of `_uar_panels` for each modality."""
    return {key: panel for key, panel in _uar_panels().items() if key in MODALITY_NAMES}


def _draw_intervals(
    path: Path,
    title: str,
    table: pd.DataFrame,
    panels: Mapping[str, tuple[str, float]],
    styles: Mapping[str, SeriesStyle],
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Draw values with intervals, a row per style.

    `panels`, {key: (heading, chance)}, stand side by side; `table` has the columns row, panel,
    split, value, low, high, n.
    """
    panels = {key: panel for key, panel in panels.items() if key in set(table["panel"])}
    styles = {key: style for key, style in styles.items() if key in set(table["row"])}
    external = "external" in set(table["split"])
    note = "In per cent. Bar: 95 % interval over patients. Dashed: chance."
    note += "\nGrey line: the blind baseline that was best on validation." if baselines else ""
    note += "\nCircle: test split. Diamond: external sites." if external else "\nTest split."
    labels = [wrap(style.name, 30) for style in styles.values()]
    row = max(0.8 if external else 0.58, LINE * count_lines(labels) + 0.1)
    height = row * len(styles) + LINE * (5 if external else 4) + 0.9
    with drawing(path, height, title, note) as figure:
        figure.get_layout_engine().set(w_pad=0.1)
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (key, (heading, chance)) in zip(grid, panels.items(), strict=True):
            rows = table[table["panel"] == key]
            sizes = rows.groupby("split")["n"].max()
            counts = [f"{n} {sizes[s]:,}" for s, n in COUNTED.items() if s in sizes]
            axes.set_title("\n".join([heading, *counts]))
            _interval_panel(axes, rows, styles, external)
            axes.axvline(chance, color="0.3", linestyle="--", linewidth=1, zorder=1)
            if baselines and key in baselines:
                axes.axvline(baselines[key], color="0.75", linewidth=2, zorder=1)
        grid[0].set_yticks(range(len(styles)), labels)
        grid[0].set_ylim(len(styles) - 0.4, -0.6)


def _interval_panel(
    axes: Axes, table: pd.DataFrame, styles: Mapping[str, SeriesStyle], external: bool
) -> None:
    for place, (key, style) in enumerate(styles.items()):
        if style.hollow:
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)
        for row in table[table["row"] == key].itertuples():
            shift = 0 if not external else -0.13 if row.split == "test" else 0.13
            _interval(axes, place + shift, row, style)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)


def _interval(axes: Axes, place: float, row: tuple, style: SeriesStyle) -> None:
    """Draw a marker with its interval; the number stands above it, below for external sites."""
    below, ground = row.split == "external", BAND if style.hollow else "white"
    axes.plot([row.low, row.high], [place, place], color=style.colour, linewidth=2)
    face = "white" if style.hollow else style.colour
    marker = {"marker": "D" if below else "o", "markersize": 7, "markerfacecolor": face}
    axes.plot(row.value, place, color=style.colour, clip_on=False, **marker)
    axes.annotate(
        percent(row.value).removesuffix(" %"),
        (row.value, place),
        (0, -7 if below else 7),
        textcoords="offset points",
        ha="left" if row.value < 0.1 else "right" if row.value > 0.9 else "center",
        va="top" if below else "bottom",
        bbox={"facecolor": ground, "edgecolor": "none", "pad": 0.5},
    )


def draw_reliability(path: Path, bins: pd.DataFrame, name: str) -> None:
    """Draw how often answers of a given confidence are right, above how many answers there are.

    `bins` has the columns split, low, high (edges), n, confidence, accuracy, accuracy_low and
    accuracy_high (limits of its 95 % interval).
    """
    splits = [split for split in SPLIT_NAMES if split in set(bins["split"])]
    title = f"Reliability of the probabilities\n{name}"
    with drawing(path, 5.6, title, "Bar: 95 % interval over patients.") as figure:
        grid = figure.subplots(
            2, len(splits), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1]
        )
        for (upper, lower), split in zip(grid.T, splits, strict=True):
            own = bins[bins["split"] == split]
            upper.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
            limits = np.abs(own[["accuracy_low", "accuracy_high"]].T - own["accuracy"]).to_numpy()
            upper.errorbar(own["confidence"], own["accuracy"], limits, fmt="o", color=COLOURS[0])
            upper.set_title(f"{SPLIT_NAMES[split]}, n = {own['n'].sum():,}")
            width = own["high"] - own["low"]
            lower.bar(own["low"], own["n"], width, align="edge", color=COLOURS[0], ec="white")
            lower.set(xlabel="Confidence", yscale="log")
            lower.xaxis.set_major_formatter(percent_tick)
        grid[0, 0].set(ylabel="Accuracy", ylim=(-0.03, 1.03), xlim=(0.3, 1.01))
        grid[0, 0].yaxis.set_major_formatter(percent_tick)
        grid[1, 0].set(ylabel="Answers", ylim=(0.8, None))
        grid[1, 0].yaxis.set_major_formatter("{x:g}")
        grid[1, 0].yaxis.set_minor_formatter(NullFormatter())


def draw_scores(path: Path, scores: pd.DataFrame, thresholds: Mapping[str, float], name: str):
    """Draw histograms of the disease score by class: a row per modality, a column per split.

    `scores` has the columns split, modality, class, low, high (edges of the bin), n; `thresholds`
    is {modality: score above which the disease is called}.
    """
    splits = [split for split in SPLIT_NAMES if split in set(scores["split"])]
    modalities = [key for key in MODALITY_NAMES if key in set(scores["modality"])]
    title = f"Probability of the disease rather than normal\n{name}"
    note = "Share of the images of each class."
    note += "\nDashed: threshold for a sensitivity of 90 % on validation." if thresholds else ""
    with drawing(path, 2.6 * len(modalities) + 1.2, title, note) as figure:
        grid = figure.subplots(len(modalities), len(splits), sharex=True, squeeze=False)
        for line, modality in zip(grid, modalities, strict=True):
            for axes, split in zip(line, splits, strict=True):
                own = scores[(scores["split"] == split) & (scores["modality"] == modality)]
                _histogram(axes, own)
                axes.set_title(f"{SPLIT_NAMES[split]}, {MODALITY_NAMES[modality]}")
                if modality in thresholds:
                    axes.axvline(thresholds[modality], color="0.2", linestyle="--", linewidth=1.2)
        for axes in grid[-1]:
            axes.set(xlabel="Score", xlim=(0, 1))


def _histogram(axes: Axes, bins: pd.DataFrame) -> None:
    for label, own in bins.groupby("class", sort=True):
        total = own["n"].sum()
        edges = [*own["low"], own["high"].iloc[-1]]
        legend = f"{ANSWER_NAMES[label]} ({total:,})"
        style = {"color": CLASS_COLOURS[label], "alpha": 0.45, "fill": True, "label": legend}
        axes.stairs(own["n"] / total, edges, **style)
    if len(bins):
        axes.legend(handlelength=1, loc="upper center", borderaxespad=0, **OPAQUE)
        top = axes.get_ylim()[1]
        ticks = MaxNLocator(4).tick_values(0, top)
        axes.set_yticks(ticks[ticks <= min(top, 1)])
        axes.set_ylim(0, 1.5 * top)  # room for the legend
    axes.yaxis.set_major_formatter(percent_tick)


def draw_training(path: Path, curves: Mapping[str, TrainingCurve]) -> None:
    """Draw losses and validation figures by epoch: a row per trained system, named by the keys."""
    note = "Dotted: the epoch that was kept. *: the figure that selected it."
    with drawing(path, 2.6 * len(curves) + 0.8, note=note) as figure:
        grid = figure.subplots(len(curves), 2, squeeze=False)
        for (left, right), (name, curve) in zip(grid, curves.items(), strict=True):
            _curves(left, curve, {"train_loss": "training", "val_loss": "validation"})
            _curves(right, curve, _shown_figures(curve.select_by))
            left.set(title=f"{wrap(name, 32)}\nCross-entropy", ylim=(0, None))
            right.set(title="Validation split", ylim=(None, 1.01))
            right.yaxis.set_major_formatter(percent_tick)
        for axes in grid[-1]:
            axes.set_xlabel("Epoch")


def _shown_figures(select_by: str | None) -> dict[str, str]:
    """Return {column: label}; the lowest recall is shown only where it selected the epoch."""
    return {
        f"val_{key}": f"{label} *" if key == select_by else label
        for key, label in CURVES.items()
        if key != "worst" or key == select_by
    }


def _curves(axes: Axes, curve: TrainingCurve, names: Mapping[str, str]) -> None:
    for (column, label), colour, marker in zip(names.items(), COLOURS, "os^D", strict=False):
        style = {"marker": marker, "markersize": 4} if len(curve.table) <= 30 else {}
        axes.plot(curve.table["epoch"], curve.table[column], color=colour, label=label, **style)
    if curve.kept is not None:
        axes.axvline(curve.kept, color="0.3", linestyle=":", linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5))
    axes.legend(handlelength=1.5, **OPAQUE)
