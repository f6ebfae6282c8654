"""Charts say what they were given; what evaluate makes of them is in test_evaluate.py."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from chest import charts
from chest.labels import LABELS, UNPARSED


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, in order."""
    saved = []
    save = charts._save
    monkeypatch.setattr(
        charts, "_save", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    return saved


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(match=lambda x: hasattr(x, "get_text"))]


def confusion(pairs):
    return pd.DataFrame(pairs, columns=["actual", "predicted"])


PAIRS = [("covid19", "covid19")] * 3 + [("covid19", "normal")] + [("normal", "normal")] * 2


def test_a_confusion_cell_shows_its_share_of_the_row(figures, tmp_path):
    charts.draw_confusions(tmp_path / "a.png", {"s": confusion(PAIRS)}, {"s": "Name (random)"})
    shown = texts(figures[0])
    for text in ("75%\n3", "25%\n1", "100%\n2", "COVID-19\nn = 4", "Normal\nn = 2"):
        assert text in shown
    # UAR (0.75 + 1) / 2, WAR 5 / 6; a class that does not occur has no row.
    assert "Name\n(random)\nn = 6   UAR 87.5%   WAR 83.3%" in shown
    assert not any("Tuberculosis\nn" in text for text in shown)


@pytest.mark.parametrize("unparsed", [True, False])
def test_unparsed_answers_have_a_column_where_there_are_any(figures, tmp_path, unparsed):
    pairs = PAIRS + [("normal", UNPARSED)] * unparsed
    charts.draw_confusions(tmp_path / "a.png", {"s": confusion(pairs)}, {"s": "Name"})
    assert ("Unparsed" in texts(figures[0])) == unparsed


def test_bars_are_as_high_as_the_recalls(figures, tmp_path):
    recalls = pd.DataFrame(
        [
            (s, label, (i + 1) / 10 + j / 4, 7)
            for j, s in enumerate("ab")
            for i, label in enumerate(LABELS)
        ],
        columns=["system", "class", "recall", "n"],
    )
    charts.draw_recalls(tmp_path / "a.png", recalls, {"a": "First", "b": "Second"})
    heights = [bar.get_height() for bar in figures[0].axes[0].patches]
    assert heights == list(recalls["recall"])
    assert {"First", "Second", "Chance (1/3)", "35%", "COVID-19\nn = 7"} <= set(texts(figures[0]))


@pytest.mark.parametrize("epochs", [1, 10, 200])
def test_training_curves_mark_the_best_epoch(figures, tmp_path, epochs):
    curve = pd.DataFrame(
        {name: np.linspace(0.1, 0.9, epochs) for name in
         ("train_loss", "val_loss", "learning_rate", "val_uar", "val_war")}
    ).assign(epoch=range(1, epochs + 1))  # fmt: skip
    charts.draw_training(tmp_path / "a.png", curve, epochs)
    for axes in figures[0].axes:
        assert list(axes.lines[-1].get_xdata()) == [epochs, epochs]
        assert np.array_equal(axes.lines[0].get_ydata(), np.linspace(0.1, 0.9, epochs))


def test_a_contact_sheet_shows_each_class_of_each_collection(figures, tmp_path):
    images = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    table = pd.DataFrame(
        {
            "collection": ["ct_slices"] * 30 + ["xrays"] * 10,
            "label": ["covid19"] * 27 + ["normal"] * 3 + ["tuberculosis"] * 10,
            "site": ["B"] * 20 + ["A"] * 20,
            "patient_id": [str(i // 2) for i in range(40)],
        }
    )
    charts.draw_contact_sheet(tmp_path / "a.png", images, table, "A note")
    shown = texts(figures[0])
    assert "A note" in shown
    assert "COVID-19\nCT slices\n27 images, 14 patients" in shown
    assert "Tuberculosis\nX-rays\n10 images, 5 patients" in shown
    rows = np.array(figures[0].axes).reshape(3, -1)
    values = [[int(a.images[0].get_array()[0, 0]) for a in row if a.images] for row in rows]
    assert [len(row) for row in values] == [8, 3, 8]
    assert all(table["label"][v] == "covid19" for v in values[0])
    assert {table["site"][v] for v in values[0]} == {"A", "B"}  # spread over the sites


def mistakes(count):
    return pd.DataFrame(
        {
            "row": range(count), "image_id": [f"image-{i}" for i in range(count)],
            "actual": "normal", "predicted": "covid19",
            "site": "A", "probability": 0.9, "truth": 0.1,
        }
    )  # fmt: skip


@pytest.mark.parametrize(("count", "panels"), [(0, 0), (3, 3), (60, 24)])
def test_the_worst_mistakes_are_shown_with_what_was_said(figures, tmp_path, count, panels):
    images = np.zeros((60, 8, 8), np.uint8)
    charts.draw_mistakes(tmp_path / "a.png", images, mistakes(count), "A title.")
    shown = texts(figures[0])
    assert shown.count("truth: Normal 10%\nsaid: COVID-19 90%") == panels
    assert ("No mistakes." in shown) == (count == 0)
    assert ("A title. The 24 worst." if count == 60 else "A title.") in shown


def test_signs_in_names_are_no_formula_and_do_no_harm(figures, tmp_path):
    odd = mistakes(1).assign(site="$\\frac{a}$ 100 % é" * 9, image_id="_^{}$$")
    charts.draw_mistakes(tmp_path / "a.png", np.zeros((1, 8, 8), np.uint8), odd, "$x_1")
    assert "$x_1" in texts(figures[0])


def test_the_same_chart_gives_the_same_bytes(tmp_path):
    for name in "ab":
        charts.draw_confusions(tmp_path / name, {"s": confusion(PAIRS)}, {"s": "Name"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with Image.open(tmp_path / "a") as picture:
        assert picture.format == "PNG"


def test_a_chart_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        charts.draw_training(path, pd.DataFrame({"epoch": [1]}), 1)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]
