"""Charts show what they were given, legibly; that `evaluate` draws them is tested with it."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from chest.core.labels import LABELS, UNPARSED
from chest.data.regions import VISIBLE
from chest.evaluation import few_shots
from chest.evaluation.predictions import CURVE_COLUMNS
from chest.reporting import charts, drawing, sheets
from chest.reporting.wording import WITHIN

NAMES = {
    "finetune_siglip": "SigLIP, fine-tuned (trained from random weights)",
    "finetune_cnn": "DenseNet-121, fine-tuned (trained from random weights)",
    "finetune_dino": "RAD-DINO, fine-tuned",
    "zeroshot_qwen": "Qwen2.5-VL, zero-shot (random weights)",
    "zeroshot_siglip": "SigLIP, zero-shot (random weights)",
    "zeroshot_gemma": "MedGemma 4B, zero-shot, with a very long name (random weights)",
    "blind_collection": "Blind: by collection and site (balanced)",
    "blind_scanner": "Blind: scanner traces",
    "blind_site": "Blind: by site (balanced)",
    "floor_site": "Floor: site's commonest class",
    "floor_collection": "Floor: collection and site's commonest class",
    "linear_pixels": "Linear on 28 x 28 pixels",
}
BLIND = list(NAMES)[6:]
STYLES = charts.palette(NAMES, BLIND)
SPLITS = (["test"], ["test", "external"])
CONDITIONS = ("asked", "no_image", "other_image", "order_a")
BASELINES = {"ct": 0.4, "xray": 0.7}


@pytest.fixture
def texts(monkeypatch):
    """Texts of the picture drawn last. One that is too small, outside or on another one fails."""
    boxes = {}
    save, draw = Figure.savefig, Text.draw

    def watched_save(figure, *arguments, **options):
        boxes.clear()
        save(figure, *arguments, **options)
        width, height = figure.get_size_inches() * drawing.DPI
        assert min(text.get_fontsize() for text in boxes) >= 11
        for text, box in boxes.items():
            inside = min(box.x0, box.y0) > -1 and box.x1 < width + 1 and box.y1 < height + 1
            assert inside, text.get_text()
        straight = [item for item in boxes.items() if item[0].get_rotation() in (0, 90)]
        for (a, one), (b, other) in itertools.combinations(straight, 2):
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            down = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(across, down) <= 1, f"{a.get_text()} lies on {b.get_text()}"

    def watched_draw(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            boxes[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(Figure, "savefig", watched_save)
    monkeypatch.setattr(Text, "draw", watched_draw)
    return lambda: [text.get_text() for text in boxes]


def intervals(key, keys, column, values, name, splits):
    """Make a row for each key, split and value: 10, 20, … % in turn."""
    cells = list(itertools.product(keys, splits, values))
    value = np.resize(np.arange(0, 1.01, 0.1), len(cells))
    table = pd.DataFrame(cells, columns=[key, "split", column])
    limits = {"low": np.maximum(value - 0.05, 0), "high": np.minimum(value + 0.05, 1)}
    return table.assign(**{name: value}, **limits, n=np.where(table["split"] == "test", 1630, 5200))


def uar_table(splits):
    return intervals("system", NAMES, "within", WITHIN, "uar", splits)


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("splits", SPLITS)
def test_intervals_of_many_systems_fit(texts, tmp_path, splits):
    path = tmp_path / "chart.png"
    charts.draw_uars(path, uar_table(splits), STYLES, BASELINES)
    assert {"0.0", "50.0", "100.0"} <= set(texts())
    assert size_of(path)[0] == 910  # 7 inches: 11 points stay legible at 430 px
    recalls = intervals("system", NAMES, "class", LABELS, "recall", splits)
    charts.draw_recalls(path, recalls, STYLES)
    assert any("Tuberculosis" in text and "n = 1,630" in text for text in texts())
    assert any("external: 5,200" in text for text in texts()) == ("external" in splits)


@pytest.mark.parametrize("splits", SPLITS)
def test_probes_stand_beside_the_blind_baseline(texts, tmp_path, splits):
    probes = intervals("probe", VISIBLE, "within", WITHIN, "uar", splits)
    charts.draw_probes(tmp_path / "probes.png", probes, BASELINES)
    assert "Border only" in texts()
    assert any("best on validation" in text for text in texts())
    charts.draw_probes(tmp_path / "probes.png", probes, {})
    assert not any("best on validation" in text for text in texts())


def transfers(sites):
    """Make figures of all regions, trained and tested at each of `sites`, {name: modality}."""
    pairs = [(a, b) for a, b in itertools.product(sites, sites) if sites[a] == sites[b]]
    cells = [(region, sites[a], a, b) for region in VISIBLE for a, b in pairs]
    table = pd.DataFrame(cells, columns=["region", "modality", "trained_on", "tested_on"])
    value = np.resize(np.arange(0, 1.01, 0.1), len(cells))
    for name in ("auroc", "uar"):
        limits = {f"{name}_low": np.maximum(value - 0.1, 0), f"{name}_high": np.minimum(value, 1)}
        table = table.assign(**{name: value}, **limits)
    return table.assign(n=np.where(table["tested_on"] == "Lima", 10, 5200))


def test_probes_across_hospitals(texts, tmp_path):
    sites = {"Babak Imaging Center of a Long Name, Tehran": "ct", "Moscow $5_100%": "ct"}
    sites |= {"Lima": "xray", "Montgomery": "xray", "Shenzhen": "xray"}
    charts.draw_across(tmp_path / "across.png", transfers(sites))
    assert {"Within\nShenzhen\nn = 5,200", "Montgomery\nto Shenzhen\nn = 5,200"} <= set(texts())
    assert not any("Lima" in text for text in texts())  # the smallest of three
    assert texts().count("Border only") == 2
    charts.draw_across(tmp_path / "none.png", transfers({"Lima": "xray"}))
    assert not (tmp_path / "none.png").exists()


def test_few_shots(texts, tmp_path):
    shots = [(str(n), n) for n in few_shots.PATIENTS] + [("all", 287)]
    cells = itertools.product(list(NAMES)[:5], few_shots.METHODS, ("ct", "xray"), shots)
    table = pd.DataFrame(
        [(e, method, m, *shot) for e, method, m, shot in cells],
        columns=["encoder", "method", "modality", "patients", "per_class"],
    ).assign(uar=0.7, sd=0.05, draws=10)
    charts.draw_few_shots(tmp_path / "few.png", table)
    assert "all\n287" in texts()
    assert {f"zeroshot_siglip, {name}" for name in few_shots.METHODS.values()} <= set(texts())
    charts.draw_few_shots(tmp_path / "few.png", table[table["modality"] == "ct"].head(8))
    assert not any("X-ray" in text for text in texts())


def test_vision_language_models_with_and_without_the_image_and_by_layer(texts, tmp_path):
    systems = ["zeroshot_qwen", "zeroshot_gemma"]
    cells = itertools.product(systems, ("test", "external"), WITHIN, CONDITIONS)
    table = pd.DataFrame([*cells], columns=["system", "split", "modality", "condition"])
    value = np.resize(np.arange(0, 1.01, 0.1), len(table))
    limits = {"uar_low": np.maximum(value - 0.1, 0), "uar_high": np.minimum(value + 0.1, 1)}
    table = table.assign(uar=value, **limits, n=1630)
    charts.draw_controls(tmp_path / "controls.png", table, STYLES)
    assert texts().count("without the image") == 2
    assert not any("three classes" in text for text in texts())

    layers = table[table["system"].eq(systems[0]) & table["split"].eq("test")].copy()
    layers["layer"] = layers["condition"].map(
        dict(zip(CONDITIONS, ("vision", "merger", "language_9"), strict=False))
    )
    layers = layers.dropna()
    charts.draw_layers(tmp_path / "l.png", layers, uar_table(["test"]), STYLES, BASELINES)
    assert {"Vision tower", "Merger", "Language layer 9"} <= set(texts())
    assert any(text.startswith("Answers: Qwen2.5-VL") for text in texts())


def test_the_line_is_the_given_baseline_whatever_is_best_on_test(monkeypatch, tmp_path):
    drawn = []
    axvline = Axes.axvline
    monkeypatch.setattr(
        Axes, "axvline", lambda axes, x, **style: (drawn.append(x), axvline(axes, x, **style))
    )
    charts.draw_uars(tmp_path / "uar.png", uar_table(["test"]), STYLES, BASELINES)
    assert drawn == [1 / 3, 1 / 2, 0.4, 1 / 2, 0.7]


def test_blind_systems_are_grey_and_others_have_colours():
    assert len({STYLES[key].colour for key in NAMES if key not in BLIND}) == 6
    assert {STYLES[key].colour for key in BLIND} == {drawing.GREY}
    assert [key for key in NAMES if STYLES[key].hollow] == BLIND
    many = charts.palette({str(i): "x" for i in range(20)}, [])
    assert len(many) == 20  # colours repeat rather than run out


def test_confusion_cells_show_shares_of_the_row(texts, tmp_path):
    pairs = [("covid19", "covid19")] * 3 + [("covid19", "normal")] + [("normal", UNPARSED)] * 2
    table = pd.DataFrame(pairs, columns=["actual", "predicted"])
    matrices = [(STYLES[key], "test", table) for key in list(NAMES)[:3]]
    charts.draw_confusions(tmp_path / "c.png", [(*matrices[0][:1], "external", table), *matrices])
    assert {"75 %\n3", "25 %\n1", "100 %\n2", "Unparsed"} <= set(texts())
    assert any("External sites, n = 6\nUAR 37.5 %   WAR 50.0 %" in text for text in texts())
    parsed = table[table["predicted"] != UNPARSED]
    charts.draw_confusions(tmp_path / "c.png", [(STYLES["blind_site"], "test", parsed)])
    assert "Unparsed" not in texts()


@pytest.mark.parametrize("splits", SPLITS)
def test_reliability_and_scores(texts, tmp_path, splits):
    low = np.arange(5, 15) / 15
    bins = [
        pd.DataFrame({"low": low, "high": low + 1 / 15, "n": 2 ** np.arange(10)}).assign(
            split=split,
            confidence=low + 0.03,
            accuracy=low,
            accuracy_low=np.maximum(low - 0.1, 0),
            accuracy_high=low + 0.1,
        )
        for split in splits
    ]
    charts.draw_reliability(tmp_path / "r.png", pd.concat(bins), NAMES["finetune_siglip"])
    assert any("n = 1,023" in text for text in texts())

    edges = np.arange(20) / 20
    classes = {"ct": ("covid19", "normal"), "xray": ("normal", "tuberculosis")}
    scores = [
        pd.DataFrame({"low": edges, "high": edges + 0.05, "n": np.arange(20)}).assign(
            split=split, modality=modality, **{"class": label}
        )
        for split in splits
        for modality, labels in classes.items()
        for label in labels
    ]
    thresholds = {"ct": 0.5, "xray": 0.3}
    charts.draw_scores(tmp_path / "s.png", pd.concat(scores), thresholds, "SigLIP")
    assert {"COVID-19 (190)", "Tuberculosis (190)", "Normal (190)"} <= set(texts())
    assert any("threshold for a sensitivity" in text for text in texts())


@pytest.mark.parametrize("epochs", [1, 40])
def test_training_has_a_row_per_system_and_marks_what_selected(texts, tmp_path, epochs):
    epoch = np.arange(1, epochs + 1)
    table = pd.DataFrame({"epoch": epoch} | {name: 1 / epoch for name in CURVE_COLUMNS[1:]})
    names = list(NAMES.values())[:3]
    curve = charts.TrainingCurve.of(table, {"best_epoch": 1, "select_by": "within"})
    charts.draw_training(tmp_path / "t.png", dict.fromkeys(names, curve))
    assert sum("Cross-entropy" in text for text in texts()) == 3
    assert {"UAR within modality *", "UAR"} <= {*texts()}
    charts.draw_training(tmp_path / "t.png", {names[0]: charts.TrainingCurve(table)})
    assert {"UAR within modality", "UAR"} <= {*texts()}


@pytest.fixture
def pictures():
    n = 24
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32)).astype(np.uint8)
    table = pd.DataFrame(
        {
            "image_id": [f"ct_slices/{'long_name_' * 5}{i}" for i in range(n)],
            "label": np.resize(LABELS, n),
            "collection": np.resize(["ct_slices", "xrays"], n),
            "modality": np.resize(["ct", "xray"], n),
            "site": np.resize(["A $5_100%", "Imaging Centre of a Long Name, Málaga"], n),
            "patient_id": [f"p{i // 2}" for i in range(n)],
        }
    )
    return images, table


def test_sheets_of_images(texts, tmp_path, pictures):
    images, table = pictures
    sheets.draw_contact_sheet(tmp_path / "c.png", images, table, "No image of a person.")
    assert any("COVID-19, CT slices: 4 images" in text for text in texts())
    lungs = np.zeros((len(images), 32, 4), np.uint8)
    table["accepted"] = table.index > 0
    sheets.draw_masks(tmp_path / "k.png", images, lungs, table, "No image of a person.")
    assert any(": the gate rejects 1 of 4" in text for text in texts())
    assert texts().count("rejected") == 1
    wrong = table.assign(row=range(24), actual="covid19", predicted="normal", truth=0.2)
    wrong["probability"] = 0.7
    sheets.draw_mistakes(tmp_path / "m.png", images, wrong, "24 of 24 wrong.")
    assert texts().count("true: COVID-19 20 %\nanswer: Normal 70 %") == sheets.MISTAKES
    sheets.draw_mistakes(tmp_path / "m.png", images, wrong.head(0), "0 of 24 wrong.")
    assert "No mistakes." in texts()


def test_regions_and_looks(texts, tmp_path, pictures):
    images, table = pictures
    masks = np.zeros((len(images), 32, 4), np.uint8)
    sheets.draw_regions(tmp_path / "r.png", images, masks, table["modality"], "Drawn phantoms.")
    assert {"Lungs hidden", "Border only", "CT", "X-ray"} <= set(texts())
    look = np.eye(4, dtype=np.float32)
    sheets.draw_relevance(
        tmp_path / "l.png", images[0], look, "Normal 90 %", "a.png", "No diagnosis."
    )
    assert "As the model sees it (32 x 32 px)" in texts()
    sheets.draw_relevance(tmp_path / "l.png", images[0], 0 * look, "Normal 90 %", "a.png", "None.")


def test_the_same_chart_gives_the_same_bytes_in_every_users_style(tmp_path):
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    charts.draw_uars(first, uar_table(["test"]), STYLES, BASELINES)
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "figure.facecolor": "red"}):
        charts.draw_uars(second, uar_table(["test"]), STYLES, BASELINES)
    assert first.read_bytes() == second.read_bytes()
    assert b"matplotlib" not in first.read_bytes().lower()


def test_a_chart_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(b"old")
    with pytest.raises(AttributeError):
        charts.draw_uars(path, uar_table(["test"]).drop(columns="low"), STYLES, {})
    assert path.read_bytes() == b"old"
