"""The zero-shot stages: what they write, resuming, several processes, other processors."""

import json
import os
import socket
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT, run_in, run_stage, write_params

from chest.core.params import load_params
from chest.models.common import batch_inference
from chest.models.common.device import start
from chest.models.siglip import SiglipPrompts, compare, load_prompt_classifier

STAGES = ("zeroshot_qwen", "zeroshot_siglip")
OTHER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


def read(study, stage):
    folder = study / "data" / "predictions"
    record = json.loads((folder / f"{stage}.json").read_text())
    return (folder / f"{stage}.csv").read_bytes(), record


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_answers_test_and_external_images(study, stage):
    run_stage(stage)
    table = pd.read_csv(f"data/predictions/{stage}.csv")
    assert list(table["image_id"]) == [f"image-{i:02}" for i in range(8, 40)]
    assert table["split"].value_counts().to_dict() == {"test": 30, "external": 2}
    record = read(study, stage)[1]
    assert (record["kind"], record["n"], record["weights"]) == ("zero-shot", 32, "random")
    assert record["precision"] == "fp64"
    assert not (study / ".resume" / stage).exists()

    content = load_params().content["phantom"][stage]
    write_params(study, **{f"phantom.{stage}": content | {"images": "all"}})
    run_stage(stage)
    assert len(pd.read_csv(f"data/predictions/{stage}.csv")) == 40


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_asks_about_no_image_twice(study, monkeypatch, stage):
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
    rows = [row for row in asked if row != "end"]
    assert set(rows) == set(range(8, 40))
    assert len(rows) == 32 + 4  # but for the batch whose line was torn
    assert not journal.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_predictor_answers_as_the_stage_does(study, stage):
    run_stage(stage)
    sys.path.insert(0, str(ROOT / "stages"))
    try:
        module = __import__(stage)
    finally:
        sys.path.pop(0)
    predictor = module.load_predictor(load_params())
    table = pd.read_csv(f"data/predictions/{stage}.csv")
    rows = np.array([39, 8, 20])
    modalities = np.resize(["ct", "xray", "xray"], 40)[rows]
    images = np.load("data/images/112.npy")
    found = predictor.classify(images, rows, list(modalities))
    written = table.iloc[rows - 8][["covid19", "normal", "tuberculosis"]]
    np.testing.assert_allclose(found, written, atol=1e-6)
    assert predictor.describe(3)["name"] == read(study, stage)[1]["name"]
    assert predictor.needs_modality == (stage == "zeroshot_qwen")
    if predictor.explain:
        assert predictor.explain(images[:2], np.array([0, 1])).shape == (2, 8, 8)


def test_two_processes_write_what_one_writes(study):
    run_stage("zeroshot_siglip")
    expected, record = read(study, "zeroshot_siglip")
    (study / "data/predictions/zeroshot_siglip.csv").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1"
    options = f"--main_process_port {port} --mixed_precision no --dynamo_backend no"
    script = str(ROOT / "stages/zeroshot_siglip.py")
    command = [*launcher.split(), *options.split(), script]
    run_in(study, *command, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert read(study, "zeroshot_siglip") == (expected, record | {"processes": 2})
    assert not (study / ".resume" / "zeroshot_siglip").exists()


SCRIPT = """
import sys
import numpy as np
from chest.core.params import load_params
from test_zeroshot import probabilities
np.save("other.npy", probabilities(sys.argv[1]))
"""


def probabilities(checkpoint):
    """Probabilities of the packed images of the study in the working directory."""
    from chest.models.common.checkpoints import find_checkpoint

    accelerator, prompts = start(0, "fp64"), load_params().section("prompts.siglip", SiglipPrompts)
    source = find_checkpoint(checkpoint, "main")
    classifier = load_prompt_classifier(accelerator, source, 112, prompts)
    with torch.inference_mode():
        images = torch.from_numpy(np.load("data/images/112.npy"))
        return compare(accelerator, classifier, images).numpy()


def test_fp64_agrees_on_other_processors(study, checkpoints):
    checkpoint = str(checkpoints / "siglip")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/models")])
    env = OTHER_PROCESSOR | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    run_in(study, sys.executable, "-c", SCRIPT, checkpoint, **env)
    np.testing.assert_allclose(np.load("other.npy"), probabilities(checkpoint), atol=1e-9, rtol=0)
