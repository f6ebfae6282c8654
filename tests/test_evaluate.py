"""evaluate: metrics, tables and pictures from the answers of the systems."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from support import failure, load_script, run_stage, write_params

from chest import audit, charts, predictions
from chest.dataset import MANIFEST_COLUMNS
from chest.intervals import intervals
from chest.labels import LABELS
from chest.systems import PROBES, SYSTEMS

N = 60  # images, of which 24 train, 12 val and 24 test

RECORD = {
    "checkpoint": "some/where", "revision": "main", "commit": None, "weights": "random", "seed": 42,
    "device": "CPU", "processes": 1, "precision": "fp32", "python": "3",
    "torch": "2", "transformers": "5",
}  # fmt: skip
OWN = {
    "zeroshot_qwen": {"method": "generate"},
    "finetune_siglip": {"trained_on": 24, "best_epoch": 1, "temperature": 1.5},
}


def answers(table, seed, splits, unparsed=()):
    rng = np.random.default_rng(seed)
    chosen = table[table["split"].isin(splits)]
    drawn = enumerate(rng.dirichlet([1, 1, 1], len(chosen)))
    return predictions.tabulate(chosen, [None if i in unparsed else row for i, row in drawn])


def write(system, table, folder=predictions.FOLDER):
    """Write answers with the record of a model, or of a floor."""
    by = system.removeprefix("floor_")
    record = {"weights": "none", "by": by} if by != system else {**RECORD, **OWN.get(system, {})}
    predictions.write(system, table, {**record, "n": len(table)}, folder)


def make_answers(folder, lacking=None):
    """Made answers of all systems in `folder`, the working directory; one answered all images.

    The test split has no X-ray of the class `lacking`.
    """
    write_params(folder)
    ids = [f"image-{i:03}" for i in range(N)]
    split = np.resize(["train", "test", "val", "test", "train"], N)
    label = np.resize(LABELS, N)
    # COVID-19 on CT, tuberculosis on X-ray, normal on both.
    xray = (label == "tuberculosis") | ((label == "normal") & (np.arange(N) % 2 == 0))
    split = np.where(xray & (label == lacking), "train", split)
    table = pd.DataFrame("x", index=range(N), columns=list(MANIFEST_COLUMNS))
    table = table.assign(
        image_id=ids, label=label, modality=np.where(xray, "xray", "ct"),
        collection=np.where(xray, "xrays", "ct_slices"),
        site=np.resize(["A", "B $5_100%", "Málaga"], N), pixel_hash=ids,
        patient_id=[f"p{i // 2}" for i in range(N)],
    )  # fmt: skip
    Path("data/audit").mkdir(parents=True)
    table.to_csv("data/manifest.csv", index=False)
    pd.DataFrame({"image_id": ids, "split": split}).to_csv("data/split.csv", index=False)
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32)).astype(np.uint8)
    np.save("data/images.npy", images)
    table["split"] = split
    pd.DataFrame(columns=audit.NEAR_COLUMNS).to_csv(audit.NEAR_DUPLICATES, index=False)
    # As where pairs are too many to be listed: all of them count.
    counts = {**dict.fromkeys(audit.COUNTED, 0), "pairs": 7, "train_test": 7, audit.TWINNED: 6}
    audit.COUNTS.write_text(json.dumps(counts))
    write("zeroshot_qwen", answers(table, 1, ["test"], [3, 5]))
    everything = ["train", "val", "test"]
    write("zeroshot_siglip", answers(table, 2, everything))
    for seed, system in enumerate(("finetune_siglip", "floor_modality", "floor_site"), 3):
        write(system, answers(table, seed, ["val", "test"]))
    for seed, probe in enumerate(PROBES, 6):
        write(probe, answers(table, seed, ["test"]), predictions.PROBES)
    curve = pd.DataFrame([[1, 1.0, 0.9, 1e-4, 0.5, 0.6]], columns=predictions.CURVE_COLUMNS)
    path = predictions.curve_path_of("finetune_siglip")
    path.parent.mkdir()
    curve.to_csv(path, index=False)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with made answers."""
    monkeypatch.chdir(tmp_path)
    make_answers(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    with contextlib.chdir(folder):
        make_answers(folder)
        run_stage("evaluate")
    return folder


@pytest.fixture
def done(made, monkeypatch):
    """A working directory in which made answers were evaluated; to be read only."""
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("label", ["normal", "tuberculosis"])
def test_a_test_split_that_lacks_a_group_is_scored_all_the_same(tmp_path, monkeypatch, label):
    monkeypatch.chdir(tmp_path)
    make_answers(tmp_path, lacking=label)
    run_stage("evaluate")
    assert "triage" not in metrics("ranking")["finetune_siglip"]
    assert "at a specificity of" not in Path("metrics/model_card.md").read_text()


def test_where_a_chart_cannot_be_drawn_nothing_is_replaced(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    path = predictions.path_of("zeroshot_siglip")
    table = pd.read_csv(path)
    write("zeroshot_siglip", table[table["split"] == "test"])
    changed = {file: file.read_bytes() for file in (path, path.with_suffix(".json"))}
    monkeypatch.setattr(charts, "draw_training", full_disk)
    with pytest.raises(SystemExit):
        run_stage("evaluate")
    after = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    assert after == before | changed


def full_disk(*_):
    raise OSError(28, "full")


def metrics(name="test"):
    return json.loads(Path(f"metrics/{name}.json").read_text())


def test_metrics_are_of_the_test_split_alone(done):
    for system in SYSTEMS:
        table = pd.read_csv(predictions.path_of(system))
        table = table[table["split"] == "test"]
        own = metrics()[system]
        assert own["war"] == round(accuracy_score(table["actual"], table["predicted"]), 4)
        recalls = [
            (table["predicted"] == label)[table["actual"] == label].mean() for label in LABELS
        ]
        assert own["uar"] == round(np.mean(recalls), 4)
        if "unparsed" not in set(
            table["predicted"]
        ):  # scikit-learn would warn about the class `unparsed`
            expected = balanced_accuracy_score(table["actual"], table["predicted"])
            assert own["uar"] == round(expected, 4)


def test_an_answer_that_names_no_class_is_counted_as_wrong(done):
    confusion = pd.read_csv("plots/confusion_zeroshot_qwen.csv")
    assert len(confusion) == 24
    assert (confusion["predicted"] == "unparsed").sum() == 2
    assert metrics()["zeroshot_qwen"]["war"] == round(
        (confusion["actual"] == confusion["predicted"]).mean(), 4
    )


def test_metrics_over_all_images_are_kept_apart(done):
    assert set(metrics("all")) == {"zeroshot_siglip"}
    table = pd.read_csv(predictions.path_of("zeroshot_siglip"))
    assert metrics("all")["zeroshot_siglip"]["all_images"]["war"] == round(
        accuracy_score(table["actual"], table["predicted"]), 4
    )


def leaves(content, path=""):
    """Every value of a nested dict with its dotted name."""
    for key, value in content.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from leaves(value, name)
        else:
            yield name, value


FILES = ("test", "within", "ranking", "probes", "audit", "all")


def test_metrics_are_numbers_only_and_each_has_one_name(done):
    # DVC drops lists from its table and keeps strings as junk; with --no-path it shows no file.
    names = []
    for file in FILES:
        for name, value in leaves(metrics(file)):
            assert isinstance(value, float | int), name
            assert round(value, 4) == value, name
            names.append(name)
    assert len(names) == len(set(names))
    assert {file.stem for file in Path("metrics").glob("*.json")} == {*FILES, "runs"}


def test_limits_stand_beside_the_values(done):
    for own in metrics().values():
        for name in ("uar", "war"):
            assert own[f"{name}_low"] < own[name] < own[f"{name}_high"]
        for label in LABELS:
            assert own["recall_low"][label] <= own["recall"][label] <= own["recall_high"][label]
    expected = intervals(evaluated("finetune_siglip"), 42)
    assert metrics()["finetune_siglip"]["uar_low"] == round(expected.uar.low, 4)


def evaluated(system, folder=predictions.FOLDER):
    """The answers to the test split, with what the manifest knows of each image."""
    table = pd.read_csv(predictions.path_of(system, folder)).merge(pd.read_csv("data/manifest.csv"))
    return table[table["split"] == "test"]


def test_within_a_modality_only_its_images_count(done):
    for kind, classes in (("ct", ["covid19", "normal"]), ("xray", ["normal", "tuberculosis"])):
        table = evaluated("finetune_siglip").query("modality == @kind")
        recalls = [
            (table["predicted"] == label)[table["actual"] == label].mean() for label in classes
        ]
        found = metrics("within")["finetune_siglip"]["within"][kind]
        assert found["uar"] == round(np.mean(recalls), 4)
    listed = pd.read_csv("metrics/within.csv", keep_default_na=False)
    assert set(listed["system"]) == set(SYSTEMS)
    assert (listed["note"].str.startswith("one class only") == (listed["uar"] == "")).all()


def test_a_probe_is_scored_beside_the_whole_image(done):
    probes = pd.read_csv("plots/probes.csv").query("within == 'all'").set_index("probe")
    assert list(probes.index) == ["everything", *PROBES]
    assert probes.loc["everything", "uar"] == metrics()["finetune_siglip"]["uar"]
    hidden = evaluated("lungs_hidden", predictions.PROBES)
    expected = round(balanced_accuracy_score(hidden["actual"], hidden["predicted"]), 4)
    assert probes.loc["lungs_hidden", "uar"] == expected
    assert metrics("probes")["finetune_siglip"]["probes"]["lungs_hidden"]["uar"] == expected


def test_the_audit_says_what_is_shared(done):
    shared = metrics("audit")["audit"]["shared"]
    split = pd.read_csv("data/split.csv")["split"]
    patients = split.groupby(pd.read_csv("data/manifest.csv")["patient_id"]).nunique()
    assert shared == {"patients": (patients > 1).sum(), "pixels": 0}
    table = pd.read_csv("metrics/audit.csv")
    assert table.iloc[-1]["test_images"] == 24
    assert metrics("audit")["audit"]["near_duplicates"]["pairs"] == 7
    assert metrics("audit")["audit"]["test_share"]["near_duplicate_in_train"] == 0.25  # 6 of 24


def test_what_dvc_draws_agrees_with_the_metrics(done):
    recall = pd.read_csv("plots/recall.csv")
    for row in recall.itertuples():
        assert row.recall == metrics()[row.system]["recall"][row[2]]
        assert row.n == 8
    uars = pd.read_csv("plots/uar.csv")
    for row in uars.itertuples():
        own = metrics("within")[row.system]["within"]
        expected = metrics()[row.system] if row.within == "all" else own[row.within]
        assert (row.uar, row.low, row.high) == tuple(
            expected[f"uar{limit}"] for limit in ("", "_low", "_high")
        )
    assert uars["bar"].is_unique
    assert list(pd.read_csv("plots/training.csv").columns) == list(predictions.CURVE_COLUMNS)
    bins = pd.read_csv("plots/reliability.csv")
    assert bins["n"].sum() == 24


def test_no_table_holds_what_is_not_a_number(done):
    for path in [*Path("plots").glob("*.csv"), *Path("metrics").glob("*.*")]:
        assert not re.search(r"\b(nan|inf|infinity)\b", path.read_text(), re.IGNORECASE), path


def test_the_card_and_the_checklist_are_of_this_run(place):
    run_stage("evaluate")
    for name in ("model_card.md", "claim.md"):
        text = Path("metrics", name).read_text()
        assert "no diagnosis, no medical device" in text
        assert "Phantom run" in text
        assert "24 images of 23 patients" in text or "24 images of 24 patients" in text
        assert "{{" not in text
        assert "{%" not in text
    own = metrics()["finetune_siglip"]
    card = Path("metrics/model_card.md").read_text()
    for figure in (own["uar"], own["uar_low"], own["recall"]["tuberculosis"]):
        assert f"{100 * figure:.1f}" in card
    write_params(place, profile="study")
    run_stage("evaluate")
    assert "Phantom run" not in Path("metrics/model_card.md").read_text()


def test_pictures_are_drawn(done):
    for path in [*Path("plots").glob("*.png"), *Path("plots/sheets").glob("*.png")]:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 700
    assert len(list(Path("plots/sheets").iterdir())) == 3


def test_two_runs_give_the_same_bytes(place):
    def run():
        run_stage("evaluate")
        files = [p for folder in ("metrics", "plots") for p in Path(folder).rglob("*.*")]
        return {path: path.read_bytes() for path in files}

    assert run() == run()


def test_the_worst_mistake_comes_first():
    evaluate = load_script("stages/evaluate.py")
    table = pd.DataFrame(
        [
            ["a", "normal", "normal", 0.1, 0.8, 0.1],
            ["b", "normal", "covid19", 0.6, 0.3, 0.1],
            ["c", "tuberculosis", "normal", 0.1, 0.89, 0.01],
            ["d", "covid19", "unparsed", 1 / 3, 1 / 3, 1 / 3],
        ],
        columns=["image_id", "actual", "predicted", *LABELS],
    )
    data = evaluate.Dataset(pd.DataFrame({"image_id": list("dcba")}), None)
    wrong = evaluate.worst_mistakes(table, data)
    assert list(wrong["image_id"]) == ["c", "b", "d"]
    assert list(wrong["row"]) == [1, 2, 0]
    assert list(wrong["truth"].round(2)) == [0.01, 0.3, 0.33]
    assert list(wrong["probability"][:2]) == [0.89, 0.6]


def test_names_say_what_came_out_of_random_weights():
    evaluate = load_script("stages/evaluate.py")
    assert evaluate.display_name("zeroshot_qwen", {"weights": "random"}).endswith(
        "(random weights)"
    )
    assert "trained from random" in evaluate.display_name("finetune_siglip", {"weights": "random"})
    assert "random" not in evaluate.display_name("finetune_siglip", {"weights": "pretrained"})


@pytest.mark.parametrize(
    "lacking", ["predictions/zeroshot_qwen.csv", "training", "images.npy", "audit/counts.json"]
)
def test_what_is_missing_is_named_and_nothing_is_written(place, capsys, lacking):
    path = place / "data" / lacking
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Path(lacking).stem in failure("evaluate", capsys)
    assert not Path("metrics").exists()


def test_answers_that_do_not_fit_the_split_are_refused(place, capsys):
    path = predictions.path_of("zeroshot_siglip")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    message = failure("evaluate", capsys)
    assert "1 images missing" in message
    assert not Path("metrics").exists()
