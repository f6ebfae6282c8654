"""Checkpoints that will not do are refused by name; bugs of ours keep their traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import ResNetConfig, ResNetForImageClassification, SiglipModel

from chest.core.errors import ParameterError
from chest.core.params import load_params
from chest.models.common import checkpoints as module
from chest.models.common.checkpoints import CheckpointError, find_checkpoint
from chest.models.common.classification import head_labels, head_of
from chest.models.common.device import start
from chest.models.encoders import load_classifier
from chest.models.siglip import SiglipPrompts, load_prompt_classifier
from chest.models.vlm.model import load_vlm

PROMPTS = load_params(ROOT / "params.yaml").section("prompts.siglip", SiglipPrompts)


def load_prompts(folder, side=112):
    source = find_checkpoint(str(folder), "main")
    return load_prompt_classifier(start(0, "fp64"), source, side, PROMPTS)


def load_head(folder, side=112):
    return load_classifier(find_checkpoint(str(folder), "main"), side)


def load_qwen(folder, side=112):
    return load_vlm(start(0, "fp64"), find_checkpoint(str(folder), "main"), side)


LOADERS = {"siglip": load_prompts, "qwen": load_qwen}


@pytest.fixture(params=LOADERS)
def damaged(request, checkpoints, tmp_path):
    """A copy of a checkpoint, to be damaged, and what loads it."""
    name = request.param
    return shutil.copytree(checkpoints / name, tmp_path / name), LOADERS[name]


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# --- Where a checkpoint is -------------------------------------------------------------------


def test_the_commit_that_a_revision_names_is_resolved_once(monkeypatch, tmp_path):
    asked = []

    def cached_file(name, file, revision):
        asked.append((name, file, revision))
        return str(tmp_path / "snapshots" / "0123abc" / file)

    monkeypatch.setattr(module, "cached_file", cached_file)
    source = find_checkpoint("google/siglip", "v1")
    assert source.commit == "0123abc"
    loaded = source.load(lambda name, revision: (name, revision))
    assert loaded == ("google/siglip", "0123abc")
    assert asked == [("google/siglip", "config.json", "v1")]


@pytest.mark.parametrize("name", ["nowhere", "./no/folder", "a/b/c"])
def test_a_checkpoint_that_is_nowhere_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}.*no such folder"):
        find_checkpoint(name, "main")


# --- Files that are missing or damaged -------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "torn", "a list"])
@pytest.mark.parametrize("part", ["config", "weights", "tokenizer", "preprocessor_config"])
def test_a_missing_or_torn_file_is_named(damaged, part, damage):
    folder, load = damaged
    tokenizer = "spiece.model" if folder.name == "siglip" else "tokenizer.json"
    names = {"weights": "model.safetensors", "tokenizer": tokenizer}
    file = folder / names.get(part, f"{part}.json")
    content = file.read_bytes()
    file.unlink()
    if damage == "torn":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "a list":
        file.write_bytes(b"[1, 2]")
    named = "model_type" if (part, damage) == ("config", "missing") else part
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint {folder}.*{named}.*fetch it again"):
        load(folder)


def test_weights_that_do_not_fit_the_model_are_refused(damaged):
    folder, load = damaged
    name = sorted(load_file(folder / "model.safetensors"))[3]
    change_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=f"of another shape: .*{name[-20:]}"):
        load(folder)
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"weights are missing .*{name[-20:]}"):
        load(folder)


def test_weights_that_the_model_has_no_place_for_are_refused(damaged):
    # With fewer layers than it was trained with, a model would answer differently.
    folder, load = damaged
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"]["num_hidden_layers" if folder.name == "siglip" else "depth"] = 1
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has no place for weights"):
        load(folder)


def test_a_new_head_is_all_that_a_classifier_may_lack(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    model = load_head(folder)
    stored = load_file(folder / "model.safetensors")
    own = dict(model.named_parameters())
    assert {name for name in own if name not in stored} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(own[name], stored[name]) for name in own.keys() & stored.keys())
    change_weights(folder, lambda weights: weights.pop("vision_model.post_layernorm.bias"))
    with pytest.raises(CheckpointError, match=r"missing .*post_layernorm\.bias"):
        load_head(folder)


def test_a_head_of_other_classes_is_replaced_but_no_other_weight(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).save_pretrained(tmp_path)
    source = find_checkpoint(str(tmp_path), "main")

    def load(**changes):
        config = source.load_config(ResNetConfig)
        config.update(head_labels("shared") | changes)
        new = ("classifier.1.weight", "classifier.1.bias")
        return source.load_model(ResNetForImageClassification, new=new, config=config)

    model = load()
    stored = load_file(tmp_path / "model.safetensors")
    assert head_of(model).out_features == 3
    assert head_of(model).weight.std() > 0
    own = model.resnet.state_dict(prefix="resnet.")
    assert all(torch.equal(own[name], stored[name]) for name in own)
    with pytest.raises(CheckpointError, match=r"of another shape: resnet"):
        load(hidden_sizes=[8, 24])


# --- Other models ----------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_prompts, load_head, load_qwen])
def test_another_model_is_named_before_its_weights_are_read(checkpoints, tmp_path, load):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="model_type is clip, expected"):
        load(tmp_path)
    if load is load_qwen:  # it resizes what it is shown
        return
    shutil.copy(checkpoints / "siglip" / "config.json", tmp_path)
    with pytest.raises(ParameterError, match="image_size: 120"):
        load(tmp_path, 120)


# --- Bugs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unexpected argument"),
        AttributeError("gone"),
        RuntimeError("CUDA error"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_bug_or_full_memory_is_not_blamed_on_the_checkpoint(checkpoints, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(SiglipModel, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_prompts(checkpoints / "siglip")
    assert raised.value is error
