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
        ("fp16_resumed", "fp16"),
        ("fp32_not_resident", "fp32"),
        ("adversary", "bf16"),
        ("resnet50", "bf16"),
        ("efficientnet_b0", "bf16"),
        ("siglip_text_resumed", "fp16"),
        ("features", "bf16"),
        ("features_of_lungs_not_resident", "fp32"),
        ("regions", "bf16"),
        ("zeroshot_siglip", "fp16"),
        ("zeroshot_qwen", "bf16"),
        ("zeroshot_qwen_generate", "fp16"),
        ("zeroshot_qwen3_resumed", "fp32"),
        ("zeroshot_medgemma", "bf16"),
        ("annotate_resumed", "bf16"),
        ("finetune_qwen_resumed", "bf16"),
        ("finetune_qwen_head", "fp16"),
    ],
)
def test_a_stage_runs_on_the_device(found, name, precision):
    record = result(found, name)
    assert record["precision"] == precision
    assert "CPU" not in record["device"]


def test_stages_without_a_record_run_there_too(found):
    assert result(found, "segment_lungs_not_resident")["masks"] == 64
    assert result(found, "probe_vlm")["layers"] > 0
    assert result(found, "bf16")["explained"] == 1  # by tools/predict.py


def test_what_make_gpu_measures_runs_there(found):
    measured = result(found, "benchmarks")
    assert "CPU" not in measured["device"]
    assert (measured["rows"], measured["systems"]) == (3, 4)


@pytest.mark.parametrize(
    "name",
    [
        "fp16_resumed",
        "siglip_text_resumed",
        "segment_lungs_resumed",
        "synthesize_resumed",
        "zeroshot_qwen3_resumed",
        "annotate_resumed",
        "finetune_qwen_resumed",
    ],
)
def test_a_stage_that_is_ended_resumes_to_the_same_bytes(found, name):
    ended = result(found, name)
    assert set(ended["codes"]) == {143}
    assert ended["same"]


# --- Waits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["waits_bf16", "waits_fp16_adversary", "waits_siglip_text", "waits_segment_lungs"]
)
def test_no_training_step_waits_for_the_device(found, name):
    waits = result(found, name)
    assert waits["per_step"] == 0
    assert waits["per_epoch"] <= 3  # rows, images' rows and augmentation are copied there


def test_a_step_from_the_memory_map_copies_its_images_alone(found):
    assert result(found, "waits_not_resident")["per_step"] <= 1


def test_a_batch_of_inference_waits_for_its_answers_alone(found):
    assert result(found, "waits_inference")["per_batch"] <= 2  # row numbers there, answers back


def test_the_waits_of_a_vision_language_model_are_those_of_its_tower(found):
    """Qwen's tower reads the grid of its patches in each of its two layers: 24 waits on an H200."""
    assert result(found, "waits_zeroshot_qwen")["per_batch"] <= 30
    assert result(found, "waits_finetune_qwen")["per_step"] <= 40  # a question for each modality
