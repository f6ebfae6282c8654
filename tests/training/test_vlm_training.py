"""Fine-tuning of a vision-language model: what trains, by which likelihood, and what is kept."""

import json
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from case import write_case
from processes import exit_code, forked, run_in_two_processes
from safetensors.torch import load_file
from support import ROOT, run_stage, write_params
from torch.nn.functional import cross_entropy

from chest.core.errors import ChestError, ParameterError
from chest.core.labels import LABELS
from chest.core.params import load_params
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.vlm.adapter import LoraSettings, add_adapters, load_adapter, target_modules
from chest.models.vlm.asking import VlmPrompts
from chest.models.vlm.likelihood import class_likelihoods, encode, prepare_question
from chest.models.vlm.model import load_vlm
from chest.models.vlm.trained import load_adapted_predictor
from chest.training import loop
from chest.training.loop import Batch
from chest.training.vlm import (
    AnswerObjective,
    VlmTrainingSettings,
    load_reader,
)

SYSTEM = "finetune_qwen"
PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)
BLOCK = PARAMS.content["phantom"][SYSTEM]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "language": ["attention", "mlp"], "vision": "none"}


def settings(checkpoint, **changes):
    where = {"checkpoint": str(checkpoint), "image_size": 56, "lora": LORA, "epochs": 2}
    return VlmTrainingSettings(**BLOCK | where | {"batch_size": 6, "warmup_steps": 2} | changes)


def make_reader(checkpoint, **changes):
    accelerator = start(0, "fp64")
    own = settings(checkpoint, **changes)
    source = find_checkpoint(str(checkpoint), "main")
    return load_reader(accelerator, source, PROMPTS, own, 0), own


@pytest.fixture
def shown():
    drawn = np.random.default_rng(0).integers(0, 256, (4, 56, 56), dtype=np.uint8)
    return torch.from_numpy(drawn), torch.tensor([0, 1, 1, 0])  # CT and X-rays in one batch


# --- The model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "qwen3", "medgemma"])
def test_training_scores_as_the_zero_shot_model_does(checkpoints, shown, name):
    (reader, _), _ = make_reader(checkpoints / name)
    images, modalities = shown
    found = reader.train()(images, modalities, None)
    vlm = load_vlm(start(0, "fp64"), find_checkpoint(str(checkpoints / name), "main"), 56)
    for row, modality in enumerate(["ct", "xray", "xray", "ct"]):
        text = PROMPTS.ask(modality, PROMPTS.question)
        question = prepare_question(vlm, text, PROMPTS.spellings())
        with torch.inference_mode():
            alone = class_likelihoods(vlm, encode(vlm, images[row][None]), question)[0]
        torch.testing.assert_close(found[row].detach(), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["classes", "answer"])
def test_the_loss_is_of_the_likelihoods_that_are_scored(checkpoints, shown, loss):
    (reader, adapted), own = make_reader(checkpoints / "qwen", loss=loss)
    images, modalities = shown
    objective = AnswerObjective(own, None, None, None, None, reader, adapted)
    targets = torch.tensor([2, 0, 1, 0])
    vars(objective).update(targets=targets, modalities=modalities, adjustment=torch.zeros(3))
    found = objective.loss(reader, Batch(images, torch.arange(4), None, 0.0))
    likelihoods = reader(images, modalities, None)
    expected = {
        "classes": cross_entropy(likelihoods, targets),
        "answer": -likelihoods[range(4), targets].mean(),
    }[loss]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "medgemma"])
@pytest.mark.parametrize(
    ("method", "vision", "checkpointing"),
    [("words", "none", False), ("words", "lora", True), ("head", "none", True)],
)
def test_what_is_named_trains_and_nothing_else(
    checkpoints, shown, name, method, vision, checkpointing
):
    changes = {"method": method, "lora": LORA | {"vision": vision}, "checkpointing": checkpointing}
    (reader, _), _ = make_reader(checkpoints / name, **changes)
    named = {name for name, x in reader.named_parameters() if x.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in named)
    assert sum("language_model.layers" in name for name in named) == 2 * 7 * 2
    assert {*loop.trainable_state(reader)} == named  # without tied weights that are frozen
    assert any("vis" in name for name in named) == (vision != "none")
    assert any(name.startswith("head") for name in named) == (method == "head")
    before = {name: x.clone() for name, x in reader.state_dict().items()}
    optimizer = torch.optim.AdamW([x for x in reader.parameters() if x.requires_grad], lr=1e-2)
    images, modalities = shown
    for _ in range(2):  # one half of each adapter starts at zero and stops the other's gradient
        loss = -reader.train()(images, modalities, None).log_softmax(1)[:, 2].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, x in reader.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == named


def test_checkpointing_computes_twice_and_changes_no_gradient(checkpoints, shown):
    gradients, calls = [], []
    for checkpointing in (False, True):
        (reader, _), _ = make_reader(checkpoints / "qwen", checkpointing=checkpointing)
        layer = reader.network.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, c=checkpointing: calls.append(c))
        reader.train()(*shown, None).log_softmax(1)[:, 0].sum().backward()
        gradients.append([x.grad for x in reader.parameters() if x.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert [calls.count(c) for c in (False, True)] == [2, 4]  # for each of two modalities


def test_adapters_of_bf16_weights_are_fp32(checkpoints):
    source = find_checkpoint(str(checkpoints / "qwen"), "main")
    vlm = load_vlm(start(0, "fp64"), source, 56)
    vlm.model.to(torch.bfloat16)
    add_adapters(vlm, LoraSettings(**LORA), 0)
    kinds = {x.dtype for x in vlm.model.parameters() if x.requires_grad}
    assert kinds == {torch.float32}


def test_a_merger_without_linear_layers_is_told(checkpoints):
    vlm = load_vlm(start(0, "fp64"), find_checkpoint(str(checkpoints / "medgemma"), "main"), 56)
    with pytest.raises(ParameterError, match=r"lora\.vision: merger, but gemma3"):
        target_modules(vlm, LoraSettings(**LORA | {"vision": "merger"}))


# --- The stage -------------------------------------------------------------------------------


def write_vlm_case(folder, checkpoint, checkpoints, method):
    write_case(folder, checkpoint)
    own = settings(checkpoints / "qwen", method=method, image_size=32, micro_batch=2, save_every=4)
    own = own.model_copy(update={"checkpointing": True})
    write_params(folder, **{f"phantom.{SYSTEM}": own.model_dump()})
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint, checkpoints, tmp_path_factory):
    """A folder in which the stage has trained it to answer in words; to be read only."""
    folder = write_vlm_case(tmp_path_factory.mktemp("vlm"), checkpoint, checkpoints, "words")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(SYSTEM)
    return folder


@pytest.fixture
def case(checkpoint, checkpoints, tmp_path, monkeypatch):
    """A folder with the inputs of `trained`, as working directory."""
    monkeypatch.chdir(write_vlm_case(tmp_path, checkpoint, checkpoints, "words"))
    return tmp_path


def outputs(folder):
    """Return the predictions, their record, the curve, the controls, and the adapters."""
    paths = [*folder.glob(f"data/*/{SYSTEM}.*"), *(folder / "models" / SYSTEM).iterdir()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def check_stage(folder):
    """Check the record and the adapters, and that they answer as the stage did."""
    record = json.loads((folder / f"data/predictions/{SYSTEM}.json").read_text())
    assert "self_attn.q_proj.lora_A (2)" in record["details"]["trainable"]
    assert "visual" not in record["details"]["trainable"]
    assert record["details"]["prior"] == "none"
    stored = load_file(folder / "models" / SYSTEM / "adapter_model.safetensors")
    assert all("lora" in name for name in stored)
    assert all(weights.any() for weights in stored.values())

    predictor = load_adapted_predictor(folder / "models" / SYSTEM, load_params())
    rows = np.array([52, 60])
    said = predictor.classify(np.load(folder / "data/images/32.npy"), rows, ["ct", "ct"])
    written = pd.read_csv(folder / f"data/predictions/{SYSTEM}.csv")[[*LABELS]]
    np.testing.assert_allclose(said, written.iloc[rows - 36], atol=2e-6)


def test_a_stage_trains_and_its_adapters_predict(trained, monkeypatch):
    monkeypatch.chdir(trained)
    check_stage(trained)
    assert {path.parts[:2] for path in outputs(trained)} == {
        *(("data", name) for name in ("predictions", "training", "controls")),
        ("models", SYSTEM),
    }


def test_a_head_in_place_of_words_trains_and_predicts(
    checkpoint, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.chdir(write_vlm_case(tmp_path, checkpoint, checkpoints, "head"))
    run_stage(SYSTEM)
    check_stage(tmp_path)
    record = json.loads((tmp_path / f"data/predictions/{SYSTEM}.json").read_text())
    assert "head.weight (1)" in record["details"]["trainable"]


@forked
def test_kill_and_resume_gives_the_same_bytes(case, trained, monkeypatch, capsys):
    plain, steps = loop.train_step, []

    def killed(*arguments):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    monkeypatch.setattr(loop, "train_step", killed)
    assert exit_code(lambda: run_stage(SYSTEM)) == -signal.SIGKILL
    monkeypatch.setattr(loop, "train_step", plain)
    run_stage(SYSTEM)
    assert "Resuming after step 4 of 12" in capsys.readouterr().out
    assert outputs(case) == outputs(trained)


@forked
def test_two_processes_learn_what_one_learns(case, trained):
    run_in_two_processes(SYSTEM)
    record = json.loads((case / f"data/predictions/{SYSTEM}.json").read_text())
    assert record["processes"] == 2
    for name in ("training", "predictions", "controls"):
        one, two = (pd.read_csv(x / f"data/{name}/{SYSTEM}.csv") for x in (trained, case))
        pd.testing.assert_frame_equal(one, two, atol=1e-4, rtol=0)


def test_missing_adapters_are_told(tmp_path):
    with pytest.raises(ChestError, match="no adapter there"):
        load_adapter(start(0, "fp64"), tmp_path, 1)
