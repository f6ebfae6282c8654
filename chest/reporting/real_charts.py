"""Charts of the results on real lungs, each readable alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from chest.reporting.drawing import COLOURS, LINE, drawing, percent_tick, wrap

LEGEND = 1.3 * LINE  # height of a line of the legend
CHANCE = {"color": "0.3", "linestyle": "--", "linewidth": 1}


def draw_forest(path: Path, title: str, note: str, table: pd.DataFrame) -> None:
    """Draw values with intervals: a column of panels, a line per row, a mark per series.

    `table` has the columns panel, row, series, value, low, high; panels, rows and series are drawn
    in the order in which they first occur. Rows start at chance, 1/2.
    """
    panels, rows, series = (list(dict.fromkeys(table[name])) for name in ("panel", "row", "series"))
    step = 0.8 / len(series)
    height = (0.24 * len(series) + 0.16) * len(rows) + LINE * 4 + 1.2
    with drawing(path, height + LEGEND, title, note) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[height, LEGEND])
        grid = upper.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            own = table[table["panel"] == panel]
            for row in own.itertuples():
                k = series.index(row.series)
                place = rows.index(row.row) + (k - (len(series) - 1) / 2) * step
                _mark(axes, place, row, COLOURS[k], "osD^"[k])
            axes.axvline(0.5, **CHANCE)
            axes.set_title(wrap(panel, 14))
            axes.set_xlim(min(0.35, table["low"].min() - 0.02), 1.02)
            axes.set_xticks([0.5, 0.75, 1], ["50", "75", "100"])
            axes.tick_params("y", length=0)
            axes.spines["left"].set_visible(False)
        grid[0].set_yticks(range(len(rows)), [wrap(row, 22) for row in rows])
        grid[0].set_ylim(len(rows) - 0.4, -0.6)
        handles = [
            grid[0].plot([], [], "osD^"[k], color=COLOURS[k], label=name)[0]
            for k, name in enumerate(series)
        ]
        lower.legend(handles=handles, loc="center left", ncols=len(series))


def _mark(axes: Axes, place: float, row: tuple, colour: str, marker: str) -> None:
    axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
    axes.plot(row.value, place, marker, color=colour, markersize=5)
    axes.annotate(
        f"{100 * row.value:.0f}",
        (row.high, place),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        annotation_clip=False,
    )


def draw_lines(
    path: Path,
    title: str,
    note: str,
    table: pd.DataFrame,
    labels: Mapping[str, str],
    ticks: Sequence[float],
) -> None:
    """Draw values against a number of images: a panel per `panel`, a line per `series`.

    `table` has the columns panel, series, x, value, low, high; 0 is drawn at the left of a
    logarithmic axis. `labels` are those of the axes, x and y; `ticks` numbers on the x axis.
    """
    panels, series = (list(dict.fromkeys(table[name])) for name in ("panel", "series"))
    rows = LEGEND * len(series)
    with drawing(path, 3.8 + rows, title, note) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.4, rows])
        grid = upper.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            for k, name in enumerate(series):
                own = table[(table["panel"] == panel) & (table["series"] == name)]
                if len(own):
                    _line(axes, own.sort_values("x"), COLOURS[k], name, 1 + 0.06 * k)
            axes.set_xscale("symlog", linthresh=1, base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
            axes.set(title=wrap(panel, 34), xlabel=labels["x"])
        grid[0].set_ylabel(labels["y"])
        grid[0].yaxis.set_major_formatter(percent_tick)
        lower.legend(*grid[0].get_legend_handles_labels(), loc="center left")


def _line(axes: Axes, rows: pd.DataFrame, colour: str, name: str, shift: float) -> None:
    x, value = rows["x"] * shift, rows["value"]  # side by side, not on top of each other
    limits = np.abs(rows[["low", "high"]].T.to_numpy() - value.to_numpy())
    axes.errorbar(x, value, limits, fmt="o-", color=colour, label=name, markersize=4, capsize=2)
