"""evaluate: metrics, tables and pictures from the answers of the systems."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from support import failure, load_script, run_stage, write_params

from chest import predictions
from chest.dataset import MANIFEST_COLUMNS
from chest.labels import LABELS, SYSTEMS

N = 60  # images, of which 20 train, 16 val and 24 test


def answers(table, seed, splits, unparsed=()):
    rng = np.random.default_rng(seed)
    chosen = table[table["split"].isin(splits)]
    mask = np.isin(np.arange(len(chosen)), unparsed)
    return predictions.tabulate(chosen, rng.dirichlet([1, 1, 1], len(chosen)), mask)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with made answers of all systems; one answered all images."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    ids = [f"image-{i:03}" for i in range(N)]
    split = np.resize(["train", "test", "val", "test", "train"], N)
    label = np.resize(LABELS, N)
    table = pd.DataFrame("x", index=range(N), columns=list(MANIFEST_COLUMNS))
    table = table.assign(
        image_id=ids, label=label, collection=np.resize(["ct_slices", "xrays"], N),
        site=np.resize(["A", "B $5_100%", "Málaga"], N), pixel_hash=ids,
        patient_id=[f"p{i // 2}" for i in range(N)],
    )  # fmt: skip
    Path("data").mkdir()
    table.to_csv("data/manifest.csv", index=False)
    pd.DataFrame({"image_id": ids, "split": split}).to_csv("data/split.csv", index=False)
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32)).astype(np.uint8)
    np.save("data/images.npy", images)
    table["split"] = split
    record = {"weights": "random", "n": 24, "seed": 42}
    predictions.write("zeroshot_qwen", answers(table, 1, ["test"], [3, 5]), record)
    everything = ["train", "val", "test"]
    predictions.write("zeroshot_siglip", answers(table, 2, everything), record)
    predictions.write(
        "finetune_siglip", answers(table, 3, ["val", "test"]), {**record, "best_epoch": 1}
    )
    curve = pd.DataFrame([[1, 1.0, 0.9, 1e-4, 0.5, 0.6]], columns=predictions.CURVE_COLUMNS)
    path = predictions.curve_path_of("finetune_siglip")
    path.parent.mkdir()
    curve.to_csv(path, index=False)
    return tmp_path


def metrics(name="test"):
    return json.loads(Path(f"metrics/{name}.json").read_text())


def test_metrics_are_of_the_test_split_alone(place):
    run_stage("evaluate")
    for system in SYSTEMS:
        table = pd.read_csv(predictions.path_of(system))
        table = table[table["split"] == "test"]
        own = metrics()[system]
        assert own["war"] == round(accuracy_score(table["actual"], table["predicted"]), 4)
        recalls = [
            (table["predicted"] == label)[table["actual"] == label].mean() for label in LABELS
        ]
        assert own["uar"] == round(np.mean(recalls), 4)
        if system != "zeroshot_qwen":  # scikit-learn would warn about the class `unparsed`
            expected = balanced_accuracy_score(table["actual"], table["predicted"])
            assert own["uar"] == round(expected, 4)


def test_an_answer_that_names_no_class_is_counted_as_wrong(place):
    run_stage("evaluate")
    confusion = pd.read_csv("plots/confusion_zeroshot_qwen.csv")
    assert len(confusion) == 24
    assert (confusion["predicted"] == "unparsed").sum() == 2
    assert metrics()["zeroshot_qwen"]["war"] == round(
        (confusion["actual"] == confusion["predicted"]).mean(), 4
    )


def test_metrics_over_all_images_are_kept_apart(place):
    run_stage("evaluate")
    assert set(metrics("all")) == {"zeroshot_siglip"}
    table = pd.read_csv(predictions.path_of("zeroshot_siglip"))
    assert metrics("all")["zeroshot_siglip"]["war"] == round(
        accuracy_score(table["actual"], table["predicted"]), 4
    )


def test_metrics_are_floats_only(place):
    # DVC drops lists from its table and keeps strings as junk.
    def leaves(content):
        for value in content.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    run_stage("evaluate")
    for value in [*leaves(metrics()), *leaves(metrics("all"))]:
        assert isinstance(value, float)
        assert round(value, 4) == value


def test_what_dvc_draws_agrees_with_the_metrics(place):
    run_stage("evaluate")
    recall = pd.read_csv("plots/recall.csv")
    for row in recall.itertuples():
        assert row.recall == metrics()[row.system]["recall"][row[2]]
        assert row.n == 8
    assert list(pd.read_csv("plots/training.csv").columns) == list(predictions.CURVE_COLUMNS)


def test_pictures_are_drawn(place):
    run_stage("evaluate")
    for path in [*Path("plots").glob("*.png"), *Path("plots/sheets").glob("*.png")]:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 1000
    assert len(list(Path("plots/sheets").iterdir())) == 2


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
    data = evaluate.Dataset(pd.DataFrame({"image_id": list("dcba"), "site": list("4321")}), None)
    wrong = evaluate.worst_mistakes(table, data)
    assert list(wrong["image_id"]) == ["c", "b", "d"]
    assert list(wrong["row"]) == [1, 2, 0]
    assert list(wrong["truth"].round(2)) == [0.01, 0.3, 0.33]
    assert list(wrong["probability"][:2]) == [0.89, 0.6]
    assert list(wrong["site"]) == ["3", "2", "4"]


def test_names_say_what_came_out_of_random_weights():
    evaluate = load_script("stages/evaluate.py")
    assert evaluate.display_name("zeroshot_qwen", {"weights": "random"}).endswith(
        "(random weights)"
    )
    assert "trained from random" in evaluate.display_name("finetune_siglip", {"weights": "random"})
    assert "random" not in evaluate.display_name("finetune_siglip", {"weights": "pretrained"})


@pytest.mark.parametrize("lacking", ["predictions/zeroshot_qwen.csv", "training", "images.npy"])
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
