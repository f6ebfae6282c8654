"""Pixels, devices and the store of images."""

import json

import numpy as np
import pytest
import torch

from chest.models.common import device as device_module
from chest.models.common.checkpoints import CheckpointError, find_checkpoint
from chest.models.common.device import describe_run, device_name, float_type, processor_name, start
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import (
    Normalization,
    load_normalization,
    to_pixels,
)
from chest.models.encoders import load_classifier

CPU = torch.device("cpu")
ELSEWHERE = torch.device("cpu:0")  # to PyTorch another device than cpu: no image is on it


# --- Pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_are_normalized_and_repeated_to_three_channels(dtype):
    grey = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    normalization = Normalization((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    pixels = to_pixels(grey, normalization, lambda images: 1 - images, dtype)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels.dtype == dtype
    values = 1 - np.array([[0, 0.2], [0.4, 1]])
    for channel, mean, std in zip(pixels[0], normalization.mean, normalization.std, strict=True):
        np.testing.assert_allclose(channel, (values - mean) / std, rtol=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"image_mean": [0.5] * 3},
        {"image_mean": [0.5], "image_std": [0.5]},
        {"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0.0]},
    ],
)
def test_a_normalization_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load_normalization(find_checkpoint(str(tmp_path), "main"))


# --- Device ----------------------------------------------------------------------------------


def test_a_record_tells_device_precision_and_versions(siglip_source):
    accelerator = start(7, "fp64")
    record = describe_run(accelerator, siglip_source, load_classifier(siglip_source, 112), 7)
    assert record["device"] == device_name(accelerator) == f"CPU ({processor_name()})"
    assert (record["precision"], record["processes"], record["seed"]) == ("fp64", 1, 7)
    assert (record["weights"], record["checkpoint"]) == ("random", siglip_source.checkpoint)
    assert float_type(accelerator) == torch.float64
    assert float_type(start(7, "auto")) == torch.float32
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"].count(".") == 1  # no patch version: it changes no answer


def test_the_processor_has_a_name_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "Path", lambda _: tmp_path / "cpuinfo")
    assert processor_name()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7R13\n")
    assert processor_name() == "AMD EPYC 7R13"


# --- Store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_batches_are_the_rows_that_were_asked_for(images, device):
    store = ImageStore(images, device)
    batches = [np.array(rows) for rows in ([3, 1, 1], [4], [0, 2])]
    for rows, batch in zip(batches, store.stream(batches), strict=True):
        assert torch.equal(batch, images[rows])
        assert torch.equal(store.take(rows), images[rows])
    assert list(store.stream([])) == []


def test_one_batch_is_read_ahead_and_no_more(images):
    taken = []

    class Watched(torch.Tensor):
        def __getitem__(self, rows):
            taken.append(rows)
            return images[rows]

    store = ImageStore(images.as_subclass(Watched), ELSEWHERE)
    for i, _ in enumerate(store.stream([np.arange(4)] * 6)):
        assert len(taken) <= i + 2
    assert len(taken) == 6
