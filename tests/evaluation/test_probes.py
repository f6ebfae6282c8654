"""Region probes: they find a shortcut where it is, within a hospital and across."""

from pathlib import Path

import numpy as np
import pytest
from made import make_manifest
from support import run_stage, write_params

from chest.core.labels import LABELS
from chest.data.dataset import MANIFEST_COLUMNS
from chest.data.regions import VISIBLE, visible_region
from chest.evaluation.metrics import classification_metrics
from chest.evaluation.probes import (
    fit_across,
    nest_across,
    read_across,
    read_probes,
    score_across,
    site_names,
)

SIDE = 56


def test_regions_are_parts_of_the_image():
    mask = np.random.default_rng(0).random((SIDE, SIDE)) > 0.5
    lungs, rest = (visible_region(x, SIDE, mask) for x in ("lungs", "no_lungs"))
    assert (lungs ^ rest).all()
    assert (lungs == mask).all()
    assert visible_region("border", 100)[:8].all()
    assert not visible_region("border", 100)[8:-8, 8:-8].any()


def test_a_rule_of_one_site_is_turned_around_at_another():
    labelled = make_manifest(24, images=1)
    features = np.random.default_rng(0).normal(size=(len(labelled), 4))
    sick, shenzhen = labelled["label"] != "normal", labelled["site"] == "Shenzhen"
    features[:, 0] += 6 * np.where(sick == shenzhen, 1, -1)
    answers = fit_across(features, labelled)
    assert {*answers["trained_on"]} == {"Moscow", "Tehran", "Montgomery", "Shenzhen"}
    trained = answers[answers["trained_on"] == "Shenzhen"].merge(labelled, on="image_id")
    at_home = trained["site"] == "Shenzhen"
    assert {*trained["split"][at_home]} == {"test"}
    assert {*trained["split"][~at_home]} == {"train", "val", "test"}
    right = (trained["disease"] > 0.5) == (trained["label"] != "normal")
    assert right[at_home].all()
    assert not right[~at_home].any()

    features[(labelled["site"] != "Shenzhen").to_numpy()] *= -1
    again = fit_across(features, labelled).merge(labelled, on="image_id")
    home = again[(again["trained_on"] == "Shenzhen") & (again["site"] == "Shenzhen")]
    assert home["disease"].tolist() == trained["disease"][at_home].tolist()


def test_sites_of_one_class_or_few_patients_are_left_out():
    labelled = make_manifest(24, images=1)
    lone = labelled.drop(index=labelled.index[labelled["site"].eq("Tehran")][:-2])
    lone = lone[(lone["site"] != "Moscow") | (lone["label"] == "normal")].reset_index(drop=True)
    answers = fit_across(np.ones((len(lone), 2)), lone)
    assert {*answers["trained_on"]} == {"Montgomery", "Shenzhen"}


def test_a_site_of_two_modalities_is_two_sites():
    labelled = make_manifest(2).assign(site="Lima")
    assert {*site_names(labelled)} == {"Lima (CT)", "Lima (X-ray)"}


def test_the_stage_finds_what_the_border_tells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"checkpoint": None, "revision": "main", "image_size": SIDE, "pooling": "mean"}
    settings |= {"batch_size": 64, "view": {}}
    write_params(tmp_path, **{"phantom.probe_regions": settings})
    labelled = make_manifest(24, images=1)
    for name in ("images", "masks"):
        Path(f"data/{name}").mkdir(parents=True)
    full = labelled.reindex(columns=MANIFEST_COLUMNS, fill_value="x")
    full.to_csv("data/manifest.csv", index=False)
    labelled[["image_id", "split"]].to_csv("data/split.csv", index=False)
    rng = np.random.default_rng(0)
    images = rng.integers(40, 200, (len(labelled), SIDE, SIDE), dtype=np.uint8)
    sick = (labelled["label"] != "normal").to_numpy()
    images[sick] += 20 * visible_region("border", SIDE).astype(np.uint8)
    np.save(f"data/images/{SIDE}.npy", images)
    masks = np.zeros((len(labelled), SIDE, SIDE), bool)
    masks[:, 12:40, 10:46] = rng.random((len(labelled), 28, 36)) > 0.3
    np.save(f"data/masks/{SIDE}.npy", np.packbits(masks, axis=-1))
    index = labelled[["image_id"]].assign(method="x", area=0.3, parts=2, accepted="True", dice="")
    index.to_csv("data/masks/index.csv", index=False)

    run_stage("probe_regions")
    probes = read_probes(labelled)
    assert {*probes} == {*VISIBLE}
    finding = {"everything", "no_lungs", "border"}
    for region, probe in probes.items():
        rows = probe.of("test")
        uar = classification_metrics(rows["actual"], rows["predicted"])["uar"]
        assert (uar > 0.9) == (region in finding), (region, uar)
        assert {*rows["predicted"]} <= {*LABELS}

    table = score_across(read_across(labelled), seed=0)
    across = nest_across(table)["border"]["across"]["Shenzhen"]["Montgomery"]
    assert across["auroc"] > 0.9
    assert across["uar_low"] <= across["uar"] <= across["uar_high"]
    assert across["n"] == 72 == across["patients"]
    chance = nest_across(table)["mask"]["across"]["Montgomery"]["Shenzhen"]
    assert chance["auroc"] == pytest.approx(0.5, abs=0.25)
