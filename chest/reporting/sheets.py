"""Sheets of images as PNG files. They show images of the collections: never in Git."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy.ndimage import binary_erosion

from chest.core.labels import COLLECTION_NAMES, MODALITY_NAMES
from chest.data.masks import unpack
from chest.data.regions import VISIBLE, VISIBLE_NAMES, visible_region
from chest.reporting.drawing import LINE, WIDTH, count_lines, drawing, wrap
from chest.reporting.wording import ANSWER_NAMES, percent

SHEET_COLUMNS, MASK_COLUMNS, PAIRS = 4, 8, 4
OUTLINE = (255, 140, 0)
MISTAKES, MISTAKE_COLUMNS = 18, 3


def draw_contact_sheet(path: Path, images: np.ndarray, table: pd.DataFrame, note: str) -> None:
    """Draw images of each class of each collection, spread evenly over sites and patients.

    `images` is uint8, (N, side, side); `table` has a row for each: label, collection, site,
    patient_id. `note` is printed above.
    """
    parts = {}
    for (collection, label), rows in _groups(table, ["collection", "label"]):
        patients = f"{len(rows):,} images, {rows['patient_id'].nunique():,} patients"
        heading = f"{ANSWER_NAMES[label]}, {COLLECTION_NAMES[collection]}: {patients}"
        shown = _spread(rows, SHEET_COLUMNS)
        parts[heading] = [(images[row], site) for row, site in shown["site"].items()]
    _draw_parts(path, parts, SHEET_COLUMNS, note)


def draw_masks(
    path: Path, images: np.ndarray, lungs: np.ndarray, table: pd.DataFrame, note: str
) -> None:
    """Draw the outline of the lungs in images of each class of each site, spread over patients.

    `images` is uint8, (N, side, side); `lungs` are their masks, packed bits, uint8 (N, side,
    ceil(side / 8)); `table` has a row for each: label, modality, site, patient_id, accepted (by the
    gate).
    """
    parts = {}
    for (_, site, label), rows in _groups(table, ["modality", "site", "label"]):
        rejected = f"the gate rejects {(~rows['accepted']).sum():,} of {len(rows):,}"
        shown = _spread(rows, MASK_COLUMNS)
        parts[f"{ANSWER_NAMES[label]}, {site}: {rejected}"] = [
            (_outline(images[row], unpack(lungs[row])), "" if accepted else "rejected")
            for row, accepted in shown["accepted"].items()
        ]
    _draw_parts(path, parts, MASK_COLUMNS, f"Outlines of the lungs. {note}")


def draw_nearest(
    path: Path, made: np.ndarray, images: np.ndarray, found: pd.DataFrame, note: str
) -> None:
    """Draw synthetic images, each left of the training image whose features are nearest.

    Of each method and class those with the lowest, middle and highest percentiles. `made`, uint8
    (n, side, side), has an image for each row of `found`: method, label, percentile, dropped, and
    the row of the nearest one in `images`, uint8 (N, side, side).
    """
    parts = {}
    for (method, label), rows in _groups(found, ["method", "label"]):
        rows = rows.sort_values("percentile", kind="stable")
        last = max(0, len(rows) - PAIRS)
        for name, start in (("lowest", 0), ("middle", last // 2), ("highest", last)):
            heading = f"{ANSWER_NAMES[label]}, {method}, {len(rows):,} images: {name} percentiles"
            parts[heading] = []
            for own in rows.iloc[start : start + PAIRS].itertuples():
                caption = f"{own.percentile:.1f}" + "\ndropped" * own.dropped
                parts[heading] += [(made[own.Index], caption), (images[own.row], "real")]
    title = "Synthetic images, each with its percentile, left of the nearest training image. "
    _draw_parts(path, parts, 2 * PAIRS, title + note)


def _groups(table: pd.DataFrame, by: list[str]) -> Iterable[tuple[tuple, pd.DataFrame]]:
    return table.reset_index(drop=True).groupby(by, sort=True)


def _spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return at most `count` of `rows`, evenly spread over sites and patients."""
    rows = rows.sort_values(["site", "patient_id"], kind="stable")
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows.iloc[np.unique(places.round().astype(int))]


def _outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a grey image with the outline of a mask in colour, uint8 (side, side, 3)."""
    coloured = np.repeat(image[..., None], 3, axis=-1)
    coloured[mask & ~binary_erosion(mask, iterations=max(1, len(mask) // 112))] = OUTLINE
    return coloured


def _draw_parts(
    path: Path, parts: Mapping[str, list[tuple[np.ndarray, str]]], columns: int, note: str
) -> None:
    """Draw a row of images with captions under each heading."""
    captions = [[wrap(caption, 72 // columns) for _, caption in shown] for shown in parts.values()]
    side = 0.97 * WIDTH / columns  # inches
    heights = [0.45 + side + LINE * count_lines(row) for row in captions]
    with drawing(path, sum(heights) + 0.4, note) as figure:
        rows = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, (heading, shown), texts in zip(rows, parts.items(), captions, strict=True):
            row.suptitle(heading, x=0.01, ha="left", size=11)
            panels = _picture_panels(row, 1, columns)
            for panel, (image, _), text in zip(panels, shown, texts, strict=False):
                _show(panel, image)
                panel.set_xlabel(text)


def draw_mistakes(path: Path, images: np.ndarray, mistakes: pd.DataFrame, title: str) -> None:
    """Draw the first 18 of `mistakes` with the true class, the answer, and how sure it was.

    `mistakes` has the columns row (of `images`, uint8, (N, side, side)), image_id, actual,
    predicted, site, probability (of the answer) and truth (probability of the actual class).
    """
    shown = mistakes.head(MISTAKES)
    lines = -(-len(shown) // MISTAKE_COLUMNS)
    more = f" The {len(shown)} worst." if len(shown) < len(mistakes) else ""
    captions = [f"{wrap(m.image_id, 24)}\n{wrap(m.site, 24)}" for m in shown.itertuples()]
    height = (2.4 + LINE * (2 + count_lines(captions))) * lines
    with drawing(path, height + 0.6, title + more) as figure:
        panels = _picture_panels(figure, max(1, lines), MISTAKE_COLUMNS)
        if shown.empty:
            panels[0].set_title("No mistakes.")
        for panel, mistake, caption in zip(panels, shown.itertuples(), captions, strict=False):
            _show(panel, images[mistake.row])
            sure = "" if np.isnan(mistake.probability) else f" {percent(mistake.probability, 0)}"
            panel.set_title(
                f"true: {ANSWER_NAMES[mistake.actual]} {percent(mistake.truth, 0)}\n"
                f"answer: {ANSWER_NAMES[mistake.predicted]}{sure}"
            )
            panel.set_xlabel(caption)


def draw_regions(
    path: Path, images: np.ndarray, lungs: np.ndarray, modalities: Sequence[str], note: str
) -> None:
    """Draw what each probe sees: a row per modality, a column per region.

    `images` is uint8, (N, side, side); `lungs` are their masks, packed bits, uint8 (N, side,
    ceil(side / 8)); `modalities` are theirs.
    """
    rows = {key: np.flatnonzero(np.asarray(modalities) == key) for key in MODALITY_NAMES}
    rows = {key: found[len(found) // 2] for key, found in rows.items() if len(found)}
    with drawing(path, 1.6 * len(rows) + 0.9, f"What each probe sees. {note}") as figure:
        panels = _picture_panels(figure, len(rows), len(VISIBLE)).reshape(len(rows), -1)
        for line, (modality, row) in zip(panels, rows.items(), strict=True):
            line[0].set_ylabel(MODALITY_NAMES[modality])
            for panel, region in zip(line, VISIBLE, strict=True):
                _show(panel, _region_of(images[row], lungs[row], region))
                panel.set_title(wrap(VISIBLE_NAMES[region], 13))


def _region_of(image: np.ndarray, packed: np.ndarray, region: str) -> np.ndarray:
    """Return what a probe of `region` sees of an image, uint8 (side, side)."""
    visible = visible_region(region, len(image), unpack(packed))
    return np.where(visible, 255 if region == "mask" else image, 0).astype(np.uint8)


def draw_relevance(
    path: Path,
    image: np.ndarray,
    relevance: np.ndarray,
    title: str,
    file: str,
    note: str,
    outline: np.ndarray | None = None,
) -> None:
    """Draw an image beside itself with the patches that the answer depends on.

    `image` is uint8, (side, side); `relevance` float, (rows, columns) of patches, from 0. `file`
    and `title` are printed above, `note` below. The `outline` of a mask, bool (side, side), is
    drawn on the image, for instance that of the lungs.
    """
    side = len(image)
    share = relevance / max(relevance.max(), np.finfo(relevance.dtype).tiny)
    with drawing(path, 4.6, f"{file}\n{title}", note) as figure:
        left, right = _picture_panels(figure, 1, 2)
        left.set_title(f"As the model sees it ({side} x {side} px)")
        right.set_title("What this answer depends on")
        for panel in (left, right):
            panel.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, side, side, 0))
        if outline is not None and outline.any() and not outline.all():
            left.contour(outline, levels=[0.5], colors="#d55e00", extent=(0, side, 0, side))
        heat = right.imshow(
            share, cmap="viridis", vmin=0, vmax=1, alpha=0.6 * share, extent=(0, side, side, 0)
        )
        bar = figure.colorbar(heat, ax=(left, right), location="bottom", ticks=[0, 1], aspect=50)
        bar.set_label("Share of the strongest patch")


def _picture_panels(figure: Figure | SubFigure, rows: int, columns: int) -> np.ndarray:
    """Return empty axes for images, (rows * columns,)."""
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set(xticks=[], yticks=[], anchor="N")  # spare room goes below
        panel.spines[:].set_visible(False)
    return panels


def _show(panel: Axes, image: np.ndarray) -> None:
    panel.imshow(image, cmap="gray", vmin=0, vmax=255)
