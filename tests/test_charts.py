"""Charts say what they were given, legibly; what evaluate makes of them is in test_evaluate.py."""

import itertools
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from chest import charts
from chest.labels import LABELS, UNPARSED
from chest.regions import HIDDEN, visible_region
from chest.systems import PROBE_NAMES, PROBES, SYSTEM_NAMES, SYSTEMS, TRAINED

NAMES = SYSTEM_NAMES | {
    "zeroshot_qwen": "Qwen2.5-VL, zero-shot (random weights)",
    "finetune_siglip": "SigLIP, fine-tuned (trained from random weights)",
}


@dataclass
class Drawn:
    """The figure that was saved last, and every text that was really drawn: where, in pixels."""

    figure: Figure | None = None
    boxes: dict = field(default_factory=dict)

    def texts(self) -> list[str]:
        return [text.get_text() for text in self.boxes]

    def cramped(self) -> list[str]:
        """Texts that stick out of the picture, or lie on one another."""
        width, height = self.figure.get_size_inches() * charts.DPI
        out = [
            text.get_text()
            for text, box in self.boxes.items()
            if min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1
        ]
        # The box of a slanted text says nothing about what it lies on.
        straight = [(t, box) for t, box in self.boxes.items() if t.get_rotation() in (0, 90)]
        return out + [
            f"{a.get_text()} | {b.get_text()}"
            for (a, one), (b, other) in itertools.combinations(straight, 2)
            if min(one.x1, other.x1) - max(one.x0, other.x0) > 1
            and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
        ]


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn; a text that is too small or cramped in any picture fails the test."""
    seen = Drawn()
    save, draw = charts._save, Text.draw

    def watched_save(figure, path):
        seen.figure, seen.boxes = figure, {}
        save(figure, path)
        assert figure.get_figwidth() <= 8
        assert min(text.get_fontsize() for text in seen.boxes) >= 11
        assert seen.cramped() == []

    def watched_draw(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            seen.boxes[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(charts, "_save", watched_save)
    monkeypatch.setattr(Text, "draw", watched_draw)
    return seen


def confusion(pairs):
    return pd.DataFrame(pairs, columns=["actual", "predicted"])


PAIRS = [("covid19", "covid19")] * 3 + [("covid19", "normal")] + [("normal", "normal")] * 2
ALL_PAIRS = [pair for pair in itertools.product(LABELS, LABELS) for _ in range(400)]


def test_a_confusion_cell_shows_its_share_of_the_row(drawn, tmp_path):
    charts.draw_confusions(tmp_path / "a.png", {"s": confusion(PAIRS)}, {"s": "Name"})
    shown = drawn.texts()
    for text in ("75 %\n3", "25 %\n1", "100 %\n2", "COVID-19\nn = 4", "Normal\nn = 2"):
        assert text in shown
    # UAR (0.75 + 1) / 2, WAR 5 / 6; a class that does not occur has no row.
    assert "Name\nUAR 87.5 %   WAR 83.3 %\nn = 6" in shown
    assert not any("Tuberculosis\nn" in text for text in shown)


@pytest.mark.parametrize("unparsed", [True, False])
def test_unparsed_answers_have_a_column_where_there_are_any(drawn, tmp_path, unparsed):
    answers = {
        "a": confusion(ALL_PAIRS + [("normal", UNPARSED)] * unparsed),
        "b": confusion(ALL_PAIRS),
    }
    charts.draw_confusions(tmp_path / "a.png", answers, {"a": "First", "b": "Second"})
    assert drawn.texts().count("Unparsed") == unparsed


def test_floors_stand_apart_from_the_models(drawn, tmp_path):
    answers = {system: confusion(ALL_PAIRS) for system in reversed(SYSTEMS)}
    charts.draw_confusions(tmp_path / "a.png", answers, NAMES)
    places = {axes.get_title("left").split("\n")[0]: axes for axes in drawn.figure.axes}
    rows = [round(axes.get_position().y0, 2) for axes in places.values()]
    assert rows == sorted(rows, reverse=True)
    assert [rows.count(row) for row in dict.fromkeys(rows)] == [2, 1, 2]  # floors share none
    left, right, alone = [axes.get_position().x0 for axes in places.values()][:3]
    assert alone == pytest.approx((left + right) / 2, abs=0.02)
    assert list(places)[:3] == [
        "Qwen2.5-VL, zero-shot", "SigLIP, zero-shot", "SigLIP, fine-tuned",
    ]  # fmt: skip
    colours = [to_hex(axes.images[0].cmap(1.0)).upper() for axes in places.values()]
    assert colours == [charts.COLOURS[system] for system in SYSTEMS]
    assert colours[3] == colours[4] == charts.GREY
    assert any("Grey: floors" in text for text in drawn.texts())


def test_numbers_are_read_on_every_ground():
    grounds = [mpl.colors.to_rgb(c) for c in (*charts.COLOURS.values(), charts.OTHER, "white")]
    for ground, share in itertools.product(grounds, np.linspace(0, 1, 21)):
        mixed = 1 - share * (1 - np.array(ground))
        linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722] + 0.05
        contrast = luminance / 0.05 if charts._ink(mixed) == "black" else 1.05 / luminance
        assert contrast >= 4.4


def figures_of(keys: dict[str, list[str]], value: str) -> pd.DataFrame:
    """A row for each combination of `keys`, with limits 0.1 below and 0.05 above its `value`."""
    table = pd.DataFrame(itertools.product(*keys.values()), columns=list(keys))
    table[value] = (np.arange(len(table)) * 0.37 + 0.12).round(3) % 1
    low, high = (table[value] - 0.1).clip(lower=0), (table[value] + 0.05).clip(upper=1)
    return table.assign(low=low, high=high, n=1630, bar="")


def intervals_in(axes):
    """{row's place: (value, low, high)} and the markers' faces of a panel."""
    lines = [(line.get_xdata(), line.get_ydata(), line) for line in axes.lines]
    points = {float(y[0]): float(x[0]) for x, y, _ in lines if len(x) == 1}
    faces = [to_hex(line.get_markerfacecolor()).upper() for x, _, line in lines if len(x) == 1]
    limits = {float(y[0]): tuple(x) for x, y, line in lines if len(x) == 2 and y[0] == y[1]}
    return {place: (points[place], *limits[place]) for place in points}, faces


def test_recalls_are_points_with_their_intervals(drawn, tmp_path):
    recalls = figures_of({"system": list(SYSTEMS), "class": list(LABELS)}, "recall")
    charts.draw_recalls(tmp_path / "a.png", recalls.iloc[::-1], NAMES)
    assert len(drawn.figure.axes) == 3
    for axes, label in zip(drawn.figure.axes, LABELS, strict=True):
        found, faces = intervals_in(axes)
        rows = recalls[recalls["class"] == label]
        assert list(found.values()) == list(
            rows[["recall", "low", "high"]].itertuples(index=False, name=None)
        )
        models = [charts.COLOURS[system] for system in SYSTEMS[:3]]
        assert faces == [*models, "#FFFFFF", "#FFFFFF"]  # floors are hollow
        assert any(list(line.get_xdata()) == [1 / 3, 1 / 3] for line in axes.lines)
        for floor in rows["recall"][3:]:  # drawn through all rows, beside every system
            assert any(list(line.get_xdata()) == [floor, floor] for line in axes.lines)
    shown = drawn.texts()
    name = "SigLIP, fine-tuned\n(trained from\nrandom weights)"
    assert {"COVID-19\nn = 1,630", "12.0 %", name} <= set(shown)
    assert any("95 % interval, bootstrap over patients" in text for text in shown)


def test_what_is_missing_has_no_panel_row_or_note(drawn, tmp_path):
    recalls = figures_of({"system": [TRAINED], "class": ["normal"]}, "recall")
    recalls[["recall", "low", "high"]] = 1.0  # an interval of no width
    charts.draw_recalls(tmp_path / "a.png", recalls, NAMES)
    (panel,) = drawn.figure.axes
    assert intervals_in(panel)[0] == {0: (1.0, 1.0, 1.0)}
    assert "100.0 %" in drawn.texts()
    assert not any("Grey" in text for text in drawn.texts())


def test_a_class_that_one_system_lacks_leaves_its_row_empty(drawn, tmp_path):
    recalls = figures_of({"system": list(SYSTEMS), "class": list(LABELS)}, "recall").iloc[1:]
    charts.draw_recalls(tmp_path / "a.png", recalls, NAMES)
    assert list(intervals_in(drawn.figure.axes[0])[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("within", [["all", "ct", "xray"], ["all", "ct"], ["xray"]])
def test_uars_stand_beside_the_chance_of_their_classes(drawn, tmp_path, within):
    uars = figures_of({"system": list(SYSTEMS), "within": within}, "uar")
    charts.draw_uars(tmp_path / "a.png", uars, NAMES)
    chances = [
        float(line.get_xdata()[0])
        for axes in drawn.figure.axes
        for line in axes.lines
        if line.get_linestyle() == "--"
    ]
    assert chances == [{"all": 1 / 3}.get(part, 1 / 2) for part in within]
    headings = [axes.get_title("left").split(":")[0] for axes in drawn.figure.axes]
    names = {"all": "All images", "ct": "Within CT", "xray": "Within X-ray"}
    assert headings == [names[part] for part in within]


def test_probes_that_hide_the_lungs_are_hollow(drawn, tmp_path):
    table = figures_of({"probe": ["everything", *PROBES], "within": ["all", "ct", "xray"]}, "uar")
    charts.draw_probes(tmp_path / "a.png", table, NAMES[TRAINED])
    names = [label.get_text() for label in drawn.figure.axes[0].get_yticklabels()]
    assert names == list(PROBE_NAMES.values())
    own = charts.COLOURS[TRAINED]
    assert intervals_in(drawn.figure.axes[0])[1] == [own, own, "#FFFFFF", "#FFFFFF"]
    shown = " ".join(drawn.texts()).replace("\n", " ")
    assert "still answers with the lungs hidden has learned the scanner" in shown
    assert NAMES[TRAINED] in shown


@pytest.mark.parametrize("first", [4, 14])  # equal shares, rounded, are in the fifth of 15 bins
def test_reliability_shows_accuracy_by_confidence(drawn, tmp_path, first):
    low = np.arange(first, 15) / 15
    bins = pd.DataFrame(
        {"low": low, "high": low + 1 / 15, "n": np.arange(len(low)) * 100 + 1007,
         "confidence": low + 0.03, "accuracy": low / 2}
    )  # fmt: skip
    charts.draw_reliability(tmp_path / "a.png", bins, NAMES[TRAINED])
    upper, lower = drawn.figure.axes
    (points,) = [c for c in upper.collections if hasattr(c, "get_sizes") and len(c.get_sizes())]
    assert np.array_equal(points.get_offsets(), bins[["confidence", "accuracy"]])
    assert np.all(np.diff(points.get_sizes()) > 0)
    assert [bar.get_height() for bar in lower.patches] == list(bins["n"])
    assert lower.get_xlim()[0] < bins["low"].min()
    assert lower.get_xlim()[0] < bins["confidence"].min()
    assert f"{bins['n'].iloc[-1]:,}" in drawn.texts()


def curve_of(epochs, scale=1.0):
    return pd.DataFrame(
        {name: np.linspace(0.1, 0.9, epochs) * scale for name in
         ("train_loss", "val_loss", "learning_rate", "val_uar", "val_war")}
    ).assign(epoch=range(1, epochs + 1))  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 10, 60])
def test_training_curves_mark_the_best_epoch(drawn, tmp_path, epochs):
    charts.draw_training(tmp_path / "a.png", curve_of(epochs), epochs)
    for axes in drawn.figure.axes:
        assert list(axes.lines[-1].get_xdata()) == [epochs, epochs]
        assert np.array_equal(axes.lines[0].get_ydata(), np.linspace(0.1, 0.9, epochs))
    assert f"kept: epoch {epochs}" in drawn.texts()
    assert "base" not in drawn.texts()
    ticks = [t.get_text() for t in drawn.boxes if t in drawn.figure.axes[2].get_xticklabels()]
    assert ticks
    assert all(tick.isdigit() for tick in ticks)  # an epoch has no fractions


def test_another_training_is_drawn_dashed(drawn, tmp_path):
    before = curve_of(4, scale=0.5)
    charts.draw_training(tmp_path / "a.png", curve_of(6), 6, before)
    for axes, count in zip(drawn.figure.axes, (2, 2, 1), strict=True):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert len(dashed) == count
        for line in dashed:
            assert np.array_equal(line.get_ydata(), before["val_uar"])
    assert "base" in drawn.texts()


def test_a_contact_sheet_shows_each_class_of_each_collection(drawn, tmp_path):
    images = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    table = pd.DataFrame(
        {
            "collection": ["ct_slices"] * 30 + ["xrays"] * 10,
            "label": ["covid19"] * 27 + ["normal"] * 3 + ["tuberculosis"] * 10,
            "site": ["B"] * 20 + ["Municipal Hospitals in Moscow"] * 20,
            "patient_id": [str(i // 2) for i in range(40)],
        }
    )
    charts.draw_contact_sheet(tmp_path / "a.png", images, table, "A note")
    shown = drawn.texts()
    assert "A note" in shown
    assert "COVID-19, CT slices: 27 images, 14 patients" in shown
    assert "Tuberculosis, X-rays: 10 images, 5 patients" in shown
    assert "Municipal\nHospitals\nin Moscow" in shown
    rows = np.array(drawn.figure.axes).reshape(3, -1)
    values = [[int(a.images[0].get_array()[0, 0]) for a in row if a.images] for row in rows]
    assert [len(row) for row in values] == [4, 3, 4]
    assert all(table["label"][v] == "covid19" for v in values[0])
    assert len({table["site"][v] for v in values[0]}) == 2  # spread over the sites


def mistakes(count):
    return pd.DataFrame(
        {
            "row": range(count), "image_id": [f"image-{i}" for i in range(count)],
            "actual": "normal", "predicted": "covid19",
            "site": "A", "probability": 0.9, "truth": 0.1,
        }
    )  # fmt: skip


@pytest.mark.parametrize(("count", "panels"), [(0, 0), (2, 2), (60, 18)])
def test_the_worst_mistakes_are_shown_with_what_was_said(drawn, tmp_path, count, panels):
    images = np.zeros((60, 8, 8), np.uint8)
    charts.draw_mistakes(tmp_path / "a.png", images, mistakes(count), "A title.")
    shown = drawn.texts()
    assert shown.count("truth: Normal 10 %\nsaid: COVID-19 90 %") == panels
    assert ("No mistakes." in shown) == (count == 0)
    assert ("A title. The 18 worst." if count == 60 else "A title.") in shown


def test_long_and_odd_names_are_no_formula_and_do_no_harm(drawn, tmp_path):
    odd = mistakes(3).assign(
        site="$\\frac{a}$ 100 % é" * 5,
        image_id=["_^{}$$", "ct_slices-6_Rahimzadeh_137covid_patient101_SR_4_IM00006", "x"],
        actual="tuberculosis", predicted=["tuberculosis", UNPARSED, "normal"],
        probability=[1.0, np.nan, 1.0], truth=1.0,
    )  # fmt: skip
    charts.draw_mistakes(tmp_path / "a.png", np.zeros((3, 8, 8), np.uint8), odd, "$x_1")
    shown = drawn.texts()
    assert "$x_1" in shown
    assert "truth: Tuberculosis 100 %\nsaid: Unparsed" in shown
    assert any(text.startswith("ct_slices-6…R_4_IM00006\n$\\frac{a}$") for text in shown)


def test_regions_show_what_a_probe_leaves(drawn, tmp_path):
    side = 20
    images = np.stack([np.full((side, side), value, np.uint8) for value in (10, 20, 240)])
    table = pd.DataFrame({"modality": ["ct", "ct", "xray"]})
    visible = {probe: visible_region(probe, side) for probe in PROBES}
    charts.draw_probe_regions(tmp_path / "a.png", images, table, "A note", visible)
    hidden = round(HIDDEN * 255)
    rows = np.array(drawn.figure.axes).reshape(2, 4)
    assert [axes.get_ylabel() for axes in rows[:, 0]] == ["CT", "X-ray"]
    for row, value in zip(rows, (20, 240), strict=True):
        for axes, probe in zip(row, PROBE_NAMES, strict=True):
            region = visible.get(probe, np.ones((side, side), bool))
            assert np.array_equal(axes.images[0].get_array(), np.where(region, value, hidden))
    titles = [axes.get_title("left").replace("\n", " ") for axes in rows[0]]
    assert titles == list(PROBE_NAMES.values())


def test_the_same_chart_gives_the_same_bytes_in_every_users_style(tmp_path):
    for name, style in {"a": {}, "b": {"lines.linewidth": 9, "savefig.bbox": "tight"}}.items():
        with mpl.rc_context(style):
            charts.draw_training(tmp_path / name, curve_of(3), 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Image.open(tmp_path / "a") as picture:
        assert picture.format == "PNG"
        assert "Software" not in picture.info


def test_a_chart_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        charts.draw_training(path, pd.DataFrame({"epoch": [1]}), 1)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]
