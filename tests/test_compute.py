"""Where weights come from, and what is recorded of a run."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from chest.compute import (
    CheckpointError,
    Normalization,
    find_checkpoint,
    load_normalization,
    record,
    start,
    to_pixels,
)
from chest.siglip import load_for_prompts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_pixels_are_normalized_and_repeated_to_three_channels():
    grey = np.random.default_rng(0).integers(0, 256, (2, 5, 7)).astype(np.uint8)
    normal = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = to_pixels(torch.from_numpy(grey), normal)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 5, 7), torch.float32)
    for channel in range(3):
        expected = (grey / 255 - normal.mean[channel]) / normal.std[channel]
        np.testing.assert_allclose(pixels[:, channel], expected, atol=1e-6)


def test_a_folder_is_a_checkpoint(checkpoints):
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    assert source.commit is None
    assert load_normalization(source) == Normalization((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoints):
    """A cache of the hub, as it is after a download, and no way to the hub itself."""
    import huggingface_hub.constants

    repository = tmp_path / "models--somebody--siglip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(checkpoints / "siglip")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


def test_the_commit_that_a_revision_names_is_loaded_and_recorded(hub):
    source = find_checkpoint("somebody/siglip", "main")
    assert source.commit == COMMIT
    model, _ = load_for_prompts(source, 224)
    assert record(start(1), source, model, 1, 9)["commit"] == COMMIT


@pytest.mark.parametrize("name", ["somebody/other", "no_such_folder", "./gone", "/a/b", "a/b/c"])
def test_a_checkpoint_that_is_nowhere_is_refused(hub, name):
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(name, "main")


def test_a_folder_that_holds_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_for_prompts(find_checkpoint(str(tmp_path), "main"), 224)


NUMBERS = ["abc", 0.5, [0.5] * 2, ["x"] * 3, [None] * 3, [float("nan")] * 3]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"image_mean": [0.5] * 3},
        *({"image_mean": [0.5] * 3, "image_std": std} for std in [*NUMBERS, [10**400] * 3]),
        *({"image_mean": mean, "image_std": [0.5] * 3} for mean in NUMBERS),
        *({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, std]} for std in (0, -1, 1e-60, 1e60)),
    ],
)
def test_a_normalization_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{tmp_path}.* its preprocessor_config.json"):
        load_normalization(find_checkpoint(str(tmp_path), "main"))


@pytest.mark.parametrize("kind", [KeyError, AttributeError, RecursionError, Exception])
def test_whatever_a_loader_raises_names_the_checkpoint_and_the_part(tmp_path, kind):
    def load(*_, **__):
        raise kind("no\n\x1b[2Jno")

    told = rf"{tmp_path}.* its weights cannot be used \({kind.__name__}: .*no"
    with pytest.raises(CheckpointError, match=told) as error:
        find_checkpoint(str(tmp_path), "main").load(load, "weights")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_what_is_no_fault_of_the_checkpoint_is_not_taken_for_one(tmp_path, kind):
    def load(*_, **__):
        raise kind

    with pytest.raises(kind):
        find_checkpoint(str(tmp_path), "main").load(load)


def test_a_file_that_may_not_be_read_is_named(checkpoints, tmp_path, monkeypatch):
    folder, opened = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip"), Path.open

    def refuse(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=f"{folder}/model.safetensors"):
        find_checkpoint(str(folder), "main")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/b", 3])
def test_an_index_that_leads_to_weights_elsewhere_is_refused(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    with safe_open(outside, "pt") as weights:
        names = dict.fromkeys(weights.keys(), str(outside) if str(name)[0] == "/" else name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(CheckpointError, match=f"{folder} .*model.safetensors.index.json"):
        load_for_prompts(find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none_is_refused(checkpoints, tmp_path, content):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json cannot be used"):
        load_for_prompts(find_checkpoint(str(folder), "main"), 224)


def test_the_record_says_what_a_result_needs_to_be_believed(checkpoints):
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    model, _ = load_for_prompts(source, 224)
    content = record(start(7), source, model, 7, 185)
    assert content["weights"] == "random"
    assert (content["seed"], content["n"], content["processes"]) == (7, 185, 1)
    assert content["torch"] == torch.__version__
    assert content["precision"] == ("bf16" if torch.cuda.is_available() else "fp32")
    assert json.loads(json.dumps(content)) == content
    del model.config.random_weights
    assert record(start(7), source, model, 7, 185)["weights"] == "pretrained"


def test_the_seed_decides_what_is_drawn():
    drawn = []
    for seed in (3, 3, 4):
        start(seed)
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
