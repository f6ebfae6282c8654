"""Floors: the commonest training class of the image's site, or of its modality."""

from pathlib import Path

import pandas as pd
import pytest
from support import run_stage, write_params

from chest import predictions
from chest.dataset import MANIFEST_COLUMNS
from chest.floors import commonest_class
from chest.labels import LABELS

# site, modality, label, split
ROWS = [
    *[("A", "ct", "covid19", "train")] * 3, ("A", "ct", "normal", "train"),
    *[("B", "ct", "normal", "train")] * 2,
    ("C", "xray", "tuberculosis", "train"), ("C", "xray", "normal", "train"),
    ("C", "xray", "tuberculosis", "train"),
    # What the floors are asked; test images must not vote.
    ("A", "ct", "normal", "test"), ("B", "ct", "covid19", "test"), ("C", "xray", "normal", "test"),
    ("D", "ct", "covid19", "test"), ("D", "ct", "covid19", "val"), ("D", "ct", "covid19", "test"),
]  # fmt: skip


def labelled():
    return pd.DataFrame(ROWS, columns=["site", "modality", "label", "split"])


def said(table, by):
    shares = commonest_class(table, by)
    assert shares.sum(1) == pytest.approx([1] * len(table))
    return [LABELS[k] for k in shares[table["split"] != "train"].argmax(1)]


def test_the_sites_commonest_training_class():
    # D has no training image: that of its modality, 3 COVID-19 and 3 normal, the first of equals.
    assert said(labelled(), "site") == [
        "covid19", "normal", "tuberculosis", "covid19", "covid19", "covid19",
    ]  # fmt: skip


def test_the_modalitys_commonest_training_class():
    table = pd.concat([labelled(), pd.DataFrame([("B", "ct", "normal", "train")],
                                                columns=["site", "modality", "label", "split"])],
                      ignore_index=True)  # fmt: skip
    assert said(table, "modality") == ["normal", "normal", "tuberculosis", *["normal"] * 3]


def test_a_modality_without_training_images_gets_those_of_all():
    table = labelled()
    table = table[~((table["modality"] == "xray") & (table["split"] == "train"))]
    assert said(table.reset_index(drop=True), "site")[2] == "covid19"


def test_the_stage_answers_validation_and_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    table = labelled().reindex(columns=[*MANIFEST_COLUMNS, "split"], fill_value="x")
    table["image_id"] = [f"i{i:02}" for i in range(len(table))]
    Path("data").mkdir()
    table[list(MANIFEST_COLUMNS)].to_csv("data/manifest.csv", index=False)
    table[["image_id", "split"]].to_csv("data/split.csv", index=False)
    run_stage("floors")
    answers = predictions.read("floor_site", table)
    assert set(answers["split"]) == {"val", "test"}
    assert list(answers["predicted"][:3]) == ["covid19", "normal", "tuberculosis"]
    assert answers.loc[0, list(LABELS)].tolist() == [0.75, 0.25, 0]
    assert predictions.read_record("floor_modality")["weights"] == "none"
    assert list(predictions.read("floor_modality", table)["image_id"]) == list(answers["image_id"])
