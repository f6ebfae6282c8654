"""The zero-shot stages: what they write, resuming, several processes."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from processes import forked, run_in_two_processes
from support import ROOT, run_stage, write_params

from chest.core.params import load_params
from chest.models.common import batch_inference

STAGES = ("zeroshot_qwen", "zeroshot_siglip")


def read(study, stage):
    folder = study / "data" / "predictions"
    record = json.loads((folder / f"{stage}.json").read_text())
    return (folder / f"{stage}.csv").read_bytes(), record


def load_stage(stage):
    sys.path.insert(0, str(ROOT / "stages"))
    try:
        return __import__(stage)
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("model", ["qwen3", "medgemma"])
def test_every_listed_model_is_asked_by_one_stage(study, checkpoints, model):
    block = load_params().content["phantom"]["zeroshot_vlm"][model]
    block |= {"checkpoint": str(checkpoints / model), "method": "generate", "prior": "none"}
    write_params(study, **{f"phantom.zeroshot_vlm.{model}": block})
    run_stage("zeroshot_vlm", model)
    assert read(study, f"zeroshot_{model}")[1]["name"] == block["name"]
    table = pd.read_csv(f"data/predictions/zeroshot_{model}.csv")
    assert set(table["predicted"]) == {"unparsed"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_answers_validation_test_and_external_images(study, stage):
    run_stage(stage)
    table = pd.read_csv(f"data/predictions/{stage}.csv")
    assert list(table["image_id"]) == [f"image-{i:02}" for i in range(5, 40)]
    assert table["split"].value_counts().to_dict() == {"test": 30, "val": 3, "external": 2}
    record = read(study, stage)[1]
    assert (record["kind"], record["n"], record["weights"]) == ("zero-shot", 35, "random")
    assert record["precision"] == "fp64"
    assert not (study / ".resume" / stage).exists()

    content = load_params().content["phantom"][stage]
    write_params(study, **{f"phantom.{stage}": content | {"images": "all"}})
    run_stage(stage)
    assert len(pd.read_csv(f"data/predictions/{stage}.csv")) == 40


def test_a_prior_of_training_images_reaches_the_predictor(study, capsys):
    content = load_params().content["phantom"]["zeroshot_qwen"]
    write_params(study, **{"phantom.zeroshot_qwen": content | {"prior": "unlabelled"}})
    run_stage("zeroshot_qwen")
    table = pd.read_csv("data/predictions/zeroshot_qwen.csv")
    images = np.load("data/images/112.npy")
    found = (
        load_stage("zeroshot_qwen")
        .load_predictor(load_params())
        .classify(images, np.array([8]), ["xray"])
    )
    written = table.iloc[[3]][["covid19", "normal", "tuberculosis"]]
    np.testing.assert_allclose(found, written, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_asks_about_no_image_twice(study, monkeypatch, stage):
    content = load_params().content["phantom"][stage]
    write_params(study, **{f"phantom.{stage}": content | {"batch_size": 4}})
    run_stage(stage)
    expected = read(study, stage)
    asked, place = [], batch_inference._fitting

    def fitting(batches, function):
        for done, (batch, answers) in enumerate(place(batches, function)):
            if done == 2 and not asked.count("end"):
                asked.append("end")
                raise KeyboardInterrupt
            asked.extend(batch.tolist())
            yield batch, answers

    monkeypatch.setattr(batch_inference, "_fitting", fitting)
    with pytest.raises(SystemExit) as end:
        run_stage(stage)
    assert end.value.code == 130
    journal = next((study / ".resume" / stage).glob("*.jsonl"))
    journal.write_text(journal.read_text()[:-20])  # killed while it wrote the last line
    run_stage(stage)
    assert read(study, stage) == expected
    rows = [row for row in asked if row != "end" and row >= 5]  # others are for the prior
    assert set(rows) == set(range(5, 40))
    assert len(rows) == 35 + 4  # but for the batch whose line was torn
    assert not journal.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_predictor_answers_as_the_stage_does(study, stage):
    run_stage(stage)
    predictor = load_stage(stage).load_predictor(load_params())
    table = pd.read_csv(f"data/predictions/{stage}.csv")
    rows = np.array([39, 8, 20])
    modalities = np.resize(["ct", "xray", "xray"], 40)[rows]
    images = np.load("data/images/112.npy")
    found = predictor.classify(images, rows, list(modalities))
    written = table.iloc[rows - 5][["covid19", "normal", "tuberculosis"]]
    np.testing.assert_allclose(found, written, atol=1e-6)
    assert predictor.describe(3)["name"] == read(study, stage)[1]["name"]
    assert predictor.needs_modality
    if predictor.explain:
        heat = predictor.explain(images[:2], np.array([0, 1]), ["ct", "xray"])
        assert heat.shape == (2, 7, 7)


@forked
def test_two_processes_write_what_one_writes(study):
    run_stage("zeroshot_siglip")
    expected, record = read(study, "zeroshot_siglip")
    (study / "data/predictions/zeroshot_siglip.csv").unlink()
    run_in_two_processes("zeroshot_siglip")
    assert read(study, "zeroshot_siglip") == (expected, record | {"processes": 2})
    assert not (study / ".resume" / "zeroshot_siglip").exists()
