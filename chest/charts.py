"""Charts and contact sheets as PNG files: the same input gives the same bytes."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from chest.files import replacing
from chest.labels import COLLECTION_NAMES, LABEL_NAMES, LABELS, UNPARSED
from chest.metrics import classification_metrics

# Okabe and Ito's palette, which colour-blind people tell apart: one colour a system.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
NAMES = {**LABEL_NAMES, UNPARSED: "Unparsed"}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a hospital's name is no formula
}
SHEET_COLUMNS = 8
MISTAKES = 24


def draw_confusions(
    path: Path, answers: Mapping[str, pd.DataFrame], names: Mapping[str, str]
) -> None:
    """One confusion matrix for each system, side by side: rows actual, columns predicted.

    `answers` are tables with the columns actual and predicted; `names` what a system is called.
    A cell shows its share of the row, and how many images that are.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(answers), 5.0), layout="constrained")
        for axes, (system, table) in zip(
            figure.subplots(1, len(answers), squeeze=False)[0], answers.items(), strict=True
        ):
            _confusion(axes, table, names[system])
        _save(figure, path)


def _confusion(axes: Axes, table: pd.DataFrame, name: str) -> None:
    rows = [label for label in LABELS if (table["actual"] == label).any()]
    columns = [*LABELS, UNPARSED] if (table["predicted"] == UNPARSED).any() else list(LABELS)
    counts = pd.crosstab(table["actual"], table["predicted"])
    counts = counts.reindex(index=rows, columns=columns, fill_value=0)
    shares = counts.div(counts.sum(axis=1), axis=0).to_numpy()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        axes.text(
            j, i, f"{share:.0%}\n{counts.iat[i, j]:,}", ha="center", va="center",
            color="white" if share > 0.5 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [NAMES[label] for label in columns])
    axes.set_yticks(
        range(len(rows)),
        [f"{NAMES[label]}\nn = {counts.loc[label].sum():,}" for label in rows],
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("Actual")
    metrics = classification_metrics(table["actual"], table["predicted"])
    numbers = f"n = {len(table):,}   UAR {metrics['uar']:.1%}   WAR {metrics['war']:.1%}"
    axes.set_title("\n(".join(name.split(" (", 1)) + f"\n{numbers}")


def draw_recalls(path: Path, recalls: pd.DataFrame, names: Mapping[str, str]) -> None:
    """The recall of each class as bars, grouped by class, one colour a system.

    `recalls` has the columns system, class, recall and n.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.0), layout="constrained")
        axes = figure.subplots()
        systems = list(dict.fromkeys(recalls["system"]))
        classes = [label for label in LABELS if (recalls["class"] == label).any()]
        width = 0.8 / len(systems)
        for k, system in enumerate(systems):
            own = recalls[recalls["system"] == system].set_index("class")["recall"]
            own = own.reindex(classes)
            places = np.arange(len(classes)) + (k - (len(systems) - 1) / 2) * width
            bars = axes.bar(
                places, own, width * 0.92, color=COLOURS[k % len(COLOURS)], label=names[system]
            )
            axes.bar_label(bars, [f"{value:.0%}" for value in own], padding=2)
        axes.axhline(
            1 / len(LABELS), color="0.3", linestyle="--", linewidth=1, label="Chance (1/3)"
        )
        count = recalls.groupby("class")["n"].first()
        axes.set_xticks(
            range(len(classes)), [f"{NAMES[label]}\nn = {count[label]:,}" for label in classes]
        )
        axes.set_ylim(0, 1.08)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("Recall")
        axes.set_title("Share of each class that is found, test split")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        _save(figure, path)


def draw_training(path: Path, curve: pd.DataFrame, best_epoch: int) -> None:
    """Losses, validation UAR and WAR, and learning rate by epoch; the best epoch is marked.

    `curve` has the columns epoch, train_loss, val_loss, learning_rate, val_uar and val_war.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.4), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, title, lines in (
            (panels[0], "Cross-entropy", {"train_loss": "training, balanced batches",
                                          "val_loss": "validation, as it is"}),
            (panels[1], "Validation split", {"val_uar": "UAR", "val_war": "WAR"}),
            (panels[2], "Learning rate at the epoch's end", {"learning_rate": ""}),
        ):  # fmt: skip
            for colour, (column, label) in zip(COLOURS, lines.items(), strict=False):
                marker = "o" if len(curve) <= 30 else None
                axes.plot(
                    curve["epoch"], curve[column], color=colour, label=label, marker=marker,
                    markersize=4,
                )  # fmt: skip
            axes.axvline(
                best_epoch, color="0.3", linestyle="--", linewidth=1,
                label=f"kept: epoch {best_epoch}",
            )  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("Epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False)
        panels[0].set_ylim(bottom=0)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
        panels[2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        _save(figure, path)


def draw_contact_sheet(path: Path, images: np.ndarray, table: pd.DataFrame, note: str) -> None:
    """Pictures of each class of each collection, spread evenly over its sites and patients.

    `images` is uint8, (N, side, side), `table` has a row for each: label, collection, site,
    patient_id. `note` is printed above.
    """
    groups = list(table.reset_index(drop=True).groupby(["collection", "label"], sort=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 2.05 * len(groups) + 0.6), layout="constrained")
        figure.suptitle(note)
        grid = figure.subplots(len(groups), SHEET_COLUMNS, squeeze=False)
        for axes, ((collection, label), rows) in zip(grid, groups, strict=True):
            rows = rows.sort_values(["site", "patient_id"], kind="stable")
            places = np.linspace(0, len(rows) - 1, min(SHEET_COLUMNS, len(rows)))
            chosen = rows.iloc[np.unique(places.round().astype(int))]
            for panel in axes:
                _blank(panel)
            for panel, row, site in zip(axes, chosen.index, chosen["site"], strict=False):
                panel.imshow(images[row], cmap="gray", vmin=0, vmax=255)
                panel.set_xlabel(_shorten(site, 24), fontsize=8)
            patients = f"{len(rows):,} images, {rows['patient_id'].nunique():,} patients"
            heading = f"{NAMES[label]}\n{COLLECTION_NAMES[collection]}\n{patients}"
            axes[0].set_ylabel(heading, fontsize=9)
        _save(figure, path)


def draw_mistakes(path: Path, images: np.ndarray, mistakes: pd.DataFrame, title: str) -> None:
    """The first 24 of `mistakes`: what each shows, what was answered, and how surely.

    `mistakes` has the columns row (of `images`, uint8, (N, side, side)), image_id, actual,
    predicted, site, probability (of the answer) and truth (the probability of the actual class).
    """
    shown = mistakes.head(MISTAKES)
    lines = max(1, -(-len(shown) // SHEET_COLUMNS))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 2.7 * lines + 0.7), layout="constrained")
        more = f" The {len(shown)} worst." if len(shown) < len(mistakes) else ""
        figure.suptitle(title + more)
        panels = figure.subplots(lines, SHEET_COLUMNS, squeeze=False).ravel()
        for panel in panels:
            _blank(panel)
        if shown.empty:
            panels[SHEET_COLUMNS // 2].set_title("No mistakes.", loc="left")
        for panel, mistake in zip(panels, shown.itertuples(), strict=False):
            panel.imshow(images[mistake.row], cmap="gray", vmin=0, vmax=255)
            sure = "" if np.isnan(mistake.probability) else f" {mistake.probability:.0%}"
            panel.set_title(
                f"truth: {NAMES[mistake.actual]} {mistake.truth:.0%}\n"
                f"said: {NAMES[mistake.predicted]}{sure}",
                fontsize=9,
            )
            panel.set_xlabel(
                f"{_shorten(mistake.image_id, 24)}\n{_shorten(mistake.site, 24)}", fontsize=7
            )
        _save(figure, path)


def _blank(panel: Axes) -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        # Without the library's version, so that the same chart gives the same bytes.
        figure.savefig(partial, format="png", dpi=100, metadata={"Software": None})
