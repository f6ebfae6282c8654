"""Every stage with a model on a GPU, or on a stand-in for one: placement, precision, waits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import require_shared

CASES = Path(__file__).with_name("cases.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case found."""
    if not torch.cuda.is_available():
        require_shared("fake-cuda")
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run([sys.executable, CASES, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def result(found, name):
    assert "error" not in found[name], found[name]["error"]
    return found[name]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("memory_map", "fp32"),
        ("adversary", "bf16"),
        ("resnet50", "bf16"),
        ("efficientnet_b0", "bf16"),
        ("features", "bf16"),
        ("zeroshot_siglip", "fp16"),
        ("zeroshot_qwen", "bf16"),
        ("zeroshot_qwen_generate", "fp16"),
    ],
)
def test_a_stage_runs_on_the_device(found, name, precision):
    record = result(found, name)
    assert record["precision"] == precision
    assert "CPU" not in record["device"]


def test_a_training_that_is_ended_twice_resumes_to_the_same_bytes(found):
    ended = result(found, "resumed")
    assert ended["codes"] == [143, 143]
    assert ended["same"]


@pytest.mark.parametrize("name", ["waits_bf16", "waits_fp16_adversary"])
def test_no_training_step_waits_for_the_device(found, name):
    waits = result(found, name)
    assert waits["per_step"] == 0
    assert waits["per_epoch"] <= 3  # rows, images' rows and augmentation are copied there


def test_a_step_from_the_memory_map_copies_its_images_alone(found):
    assert result(found, "waits_memory_map")["per_step"] <= 1


def test_a_batch_of_inference_waits_for_its_answers_alone(found):
    assert result(found, "waits_inference")["per_batch"] <= 2  # row numbers there, answers back
