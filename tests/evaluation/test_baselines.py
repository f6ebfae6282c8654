"""Blind baselines and linear models: exact on the true tables, and honest on drawn images."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made import make_manifest
from sklearn.linear_model import LogisticRegression
from support import require_shared, run_stage, write_params

from chest.core.labels import LABELS
from chest.data.dataset import MANIFEST_COLUMNS
from chest.data.regions import visible_region
from chest.evaluation.baselines import (
    RULES,
    Rule,
    fit_linear,
    fit_logistic,
    pool,
    rule_probabilities,
    scanner_features,
)
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.predictions import read_systems

SIDE = 56


# --- Rules -----------------------------------------------------------------------------------


def study_tables(folder):
    """Return label, modality, collection and site of all images of the study."""
    parts = []
    for name, label in (("covid", "covid19"), ("normal", "normal")):
        path = folder / f"meta_data_{name}.csv"
        table = pd.read_csv(path, encoding="iso-8859-1", dtype=str, keep_default_na=False)
        moscow = table["Institution"].str.contains("Moscow")
        site = table["Institution"].str.strip().mask(moscow, "Moscow")
        parts.append(pd.DataFrame({"label": label, "collection": "ct_slices", "site": site}))
    labels = ["covid19"] * 856 + ["normal"] * 254
    parts.append(pd.DataFrame({"label": labels, "collection": "ct_volumes", "site": "Moscow"}))
    films = pd.read_csv(folder / "MetaData.csv", dtype=str)
    label = np.where(films["ptb"] == "1", "tuberculosis", "normal")
    parts.append(pd.DataFrame({"label": label, "collection": "xrays", "site": films["county"]}))
    table = pd.concat(parts, ignore_index=True)
    modality = np.where(table["collection"] == "xrays", "xray", "ct")
    return table.assign(modality=modality, split="train")


def answers_of(table, rule):
    return np.array(LABELS)[rule_probabilities(table, rule).argmax(axis=1)]


@pytest.mark.parametrize(
    ("rule", "uar"),
    [
        ("blind_modality", 66.7),
        ("blind_site", 85.9),
        ("blind_collection", 88.2),
        ("floor_modality", 34.9),
        ("floor_site", 80.7),
        ("floor_collection", 82.9),
    ],
)
def test_uar_of_the_rules_on_the_studys_tables(rule, uar):
    table = study_tables(require_shared("metadata"))
    found = classification_metrics(table["label"], answers_of(table, RULES[rule]))
    assert round(100 * found["uar"], 1) == uar


def test_only_training_images_vote_and_unknown_groups_fall_back():
    train = [("A", "ct", "covid19")] * 3 + [("A", "ct", "normal"), ("B", "ct", "normal")]
    train += [("C", "xray", "tuberculosis")] * 2
    test = [("A", "ct", "normal")] * 9 + [("new", "ct", "normal"), ("new", "mri", "normal")]
    table = pd.DataFrame(train + test, columns=["site", "modality", "label"])
    table["split"] = ["train"] * len(train) + ["test"] * len(test)
    shares = rule_probabilities(table, Rule("", ("modality", "site"), balanced=False))[len(train) :]
    assert shares[0].tolist() == [0.75, 0.25, 0]
    assert shares[-2].tolist() == [0.6, 0.4, 0]  # of its modality
    assert shares[-1] == pytest.approx([3 / 7, 2 / 7, 2 / 7])  # of all
    balanced = rule_probabilities(table, Rule("", ("modality", "site"), balanced=True))[
        len(train) :
    ]
    assert balanced[0] == pytest.approx([2 / 3, 1 / 3, 0])  # 3 of 3 against 1 of 2
    assert np.isfinite(balanced).all()


# --- Linear models ---------------------------------------------------------------------------


def uar_on_ct(labelled, fitted):
    rows = ((labelled["split"] == "test") & (labelled["modality"] == "ct")).to_numpy()
    said = np.array(LABELS)[fitted.probabilities[rows].argmax(axis=1)]
    return classification_metrics(labelled["label"][rows], said)["uar"]


def test_the_scanner_model_sees_no_lung():
    labelled = make_manifest(3, images=1)
    rng = np.random.default_rng(0)
    images = rng.integers(40, 200, (len(labelled), SIDE, SIDE), dtype=np.uint8)
    border, other = visible_region("border", SIDE), images.copy()
    other[:, ~border] = 255
    before, after = (scanner_features(x, labelled) for x in (images, other))
    assert (before == after).all()
    other[:, border] += 1
    assert (before != scanner_features(other, labelled)).any(axis=1).all()


@pytest.mark.parametrize("side", [56, 100])
def test_pooling_averages_what_is_visible(side):
    images = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    everything = pool(images, np.ones((side, side), bool))
    assert everything.shape == (3, 784)
    if side == 56:
        blocks = images.reshape(3, 28, 2, 28, 2).mean(axis=(2, 4)) / 255
        assert everything == pytest.approx(blocks.reshape(3, -1))
    assert (pool(images, np.zeros((side, side), bool)) == 0).all()


def test_a_linear_model_learns_from_training_images_alone():
    labelled = make_manifest(30, images=1)
    features = np.random.default_rng(0).normal(size=(len(labelled), 5))
    features[:, 0] += 2 * (labelled["label"] != "normal")
    fitted = fit_linear(features, labelled)
    assert uar_on_ct(labelled, fitted) > 0.7
    assert {*fitted.chosen_c} == {"ct", "xray"}
    held_out = (labelled["split"] != "train").to_numpy()
    features[(labelled["split"] == "test").to_numpy()] = 0
    again = fit_linear(features, labelled)
    assert again.chosen_c == fitted.chosen_c
    train = ~held_out
    assert again.probabilities[train] == pytest.approx(fitted.probabilities[train])
    one_class = labelled[(labelled["modality"] == "xray") | (labelled["label"] == "normal")]
    alone = fit_linear(features[one_class.index], one_class)
    assert (alone.probabilities[(one_class["modality"] == "ct").to_numpy(), 1] == 1).all()


def test_few_images_of_many_features_give_the_same_model():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 60)), np.repeat(["covid19", "normal"], 20)
    features[:20] += 0.5
    train, val = slice(0, None, 2), slice(1, None, 2)
    found = fit_logistic(features[train], labels[train], features[val], labels[val])
    plain = LogisticRegression(C=found.C, class_weight="balanced", tol=1e-10, max_iter=10_000)
    plain.fit(features[train], labels[train])
    assert found.predict_proba(features) == pytest.approx(plain.predict_proba(features), abs=1e-5)


def test_the_stage_answers_every_split_but_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    labelled = make_manifest(6, splits=("train", "val", "test", "external"))
    Path("data/images").mkdir(parents=True)
    full = labelled.reindex(columns=MANIFEST_COLUMNS, fill_value="x")
    full.to_csv("data/manifest.csv", index=False)
    labelled[["image_id", "split"]].to_csv("data/split.csv", index=False)
    images = np.random.default_rng(0).integers(40, 200, (len(labelled), SIDE, SIDE), dtype=np.uint8)
    images[(labelled["label"] != "normal").to_numpy(), 20:40, 20:40] += 20
    np.save(f"data/images/{SIDE}.npy", images)
    run_stage("baselines")
    systems = read_systems(labelled)
    assert {*systems} == {*RULES, "blind_scanner", "linear_pixels"}
    assert all(system.splits == {"val", "test", "external"} for system in systems.values())
    kinds = {key: system.record.kind for key, system in systems.items()}
    assert [key for key, kind in kinds.items() if kind != "blind"] == ["linear_pixels"]
    linear = systems["linear_pixels"].of("external")
    assert (linear["actual"] == linear["predicted"]).mean() > 0.9
