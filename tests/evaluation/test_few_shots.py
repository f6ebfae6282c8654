"""Few shots and linear probes on frozen features."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made import make_manifest
from support import failure, run_stage, write_params

from chest.data.dataset import MANIFEST_COLUMNS
from chest.evaluation import few_shots
from chest.evaluation.baselines import fit_linear
from chest.evaluation.few_shots import learning_curves, nest_curves, read_curves
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.predictions import read_systems

LABELLED = make_manifest(20, images=2)


def make_features(labelled, signal=1.0, dimensions=30):
    """Make features of which three are shifted by `signal` in diseased images."""
    features = np.random.default_rng(0).normal(size=(len(labelled), dimensions))
    features[:, :3] += signal * (labelled["label"] != "normal").to_numpy()[:, None]
    return features


@pytest.fixture(scope="module")
def curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_shots, "DRAWS", 4)
        return learning_curves(make_features(LABELLED), LABELLED, seed=1)


def test_more_patients_help_where_the_features_tell_the_class(curves):
    means = curves.groupby(["method", "patients"])["uar"].mean()
    for method in few_shots.METHODS:
        assert means[method, "1"] + 0.05 < means[method, "16"] <= means[method, "all"] + 0.05
    assert {*curves["patients"]} == {"1", "2", "4", "8", "16", "all"}  # of 20 in training
    counts = curves.groupby(["method", "modality", "patients"]).size().unstack()
    assert (counts.drop(columns="all") == 4).all(axis=None)
    assert (counts["all"] == 1).all()


def test_all_patients_give_the_linear_probe(curves):
    features = make_features(LABELLED)
    fitted = fit_linear(features, LABELLED)
    rows = ((LABELLED["split"] == "test") & (LABELLED["modality"] == "ct")).to_numpy()
    said = np.where(fitted.probabilities[rows, 0] > 0.5, "covid19", "normal")
    expected = classification_metrics(LABELLED["label"][rows], said)["uar"]
    own = curves.set_index(["method", "modality", "patients"])["uar"]
    assert own["logistic", "ct", "all"] == round(expected, 4)


def test_patients_are_drawn_whole_and_added_to():
    train = LABELLED[(LABELLED["split"] == "train") & (LABELLED["modality"] == "xray")]
    part = few_shots.Part(
        np.zeros((len(train), 1)), train["label"].to_numpy(), train["patient_id"].to_numpy()
    )
    drawn = {(count, draw): chosen for count, draw, chosen in few_shots._draws(part, 1)}
    for count in (1, 4, 16):
        rows = train.iloc[drawn[count, 0]]
        assert (rows.groupby("label")["patient_id"].nunique() == count).all()
        assert len(rows) == 2 * 2 * count
    assert {*drawn[4, 0]} < {*drawn[8, 0]}
    assert {*drawn[4, 0]} != {*drawn[4, 1]}


def test_the_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    Path("data/features").mkdir(parents=True)
    full = LABELLED.reindex(columns=MANIFEST_COLUMNS, fill_value="x")
    full.to_csv("data/manifest.csv", index=False)
    LABELLED[["image_id", "split"]].to_csv("data/split.csv", index=False)
    np.save("data/features/toy.npy", make_features(LABELLED).astype(np.float32))
    made = {"weights": "random", "checkpoint": "some/where", "versions": {"torch": "2"}}
    Path("data/features/toy.json").write_text(json.dumps(made | {"image_size": 112}))

    run_stage("probe_features", "toy")
    system = read_systems(LABELLED)["probe_toy"]
    assert system.name == "Frozen toy, logistic regression (trained from random weights)"
    assert {*system.record.versions} > {"torch", "scikit-learn"}
    assert {*system.record.details} == {"image_size", "C_ct", "C_xray"}
    assert (system.answers["actual"] == system.answers["predicted"]).mean() > 0.7

    monkeypatch.setattr(few_shots, "DRAWS", 2)
    run_stage("few_shots", "toy")
    first = Path("data/few_shots/toy.csv").read_bytes()
    run_stage("few_shots", "toy")
    assert Path("data/few_shots/toy.csv").read_bytes() == first
    table = read_curves(LABELLED)
    whole = table[table["patients"] == "all"]
    assert (whole["per_class"] == 20).all()
    assert (whole["sd"] == 0).all()
    assert (table["sd"] > 0).any()
    nested = nest_curves(table)["toy"]["prototypes"]["ct"]
    assert list(nested) == ["1", "2", "4", "8", "16", "all"]
    assert nested["4"]["draws"] == 2

    np.save("data/features/toy.npy", np.zeros((3, 2), np.float32))
    assert "(3, 2)" in failure("few_shots", capsys, "toy")
    assert "other.npy" in failure("probe_features", capsys, "other")


def test_without_features_there_are_no_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = read_curves(LABELLED)
    assert isinstance(table, pd.DataFrame)
    assert nest_curves(table) == {}
