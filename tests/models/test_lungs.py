"""The U-Net for lungs: saving and loading it, the side of its masks, exposure."""

import pytest
import torch

from chest.models.common.checkpoints import CheckpointError
from chest.models.common.device import start
from chest.models.lungs import UNetConfig, load_segmenter, make_segmenter, save_segmenter

CONFIG = UNetConfig(image_size=32, channels=[4, 4, 8, 8, 8, 4])


@pytest.fixture
def saved(tmp_path):
    segmenter = make_segmenter(start(0, "fp64"), CONFIG)
    save_segmenter(segmenter, tmp_path)
    segmenter.model.eval()
    return segmenter, tmp_path


def test_a_loaded_network_finds_the_same_lungs_at_the_side_of_the_images(saved, images):
    segmenter, folder = saved
    loaded = load_segmenter(start(1, "fp64"), folder)
    assert loaded.config == CONFIG
    found = loaded.segment(images)
    assert (found.shape, found.dtype) == (images.shape, bool)
    assert (found == segmenter.segment(images)).all()


def test_exposure_changes_nothing(saved, images):
    segmenter, _ = saved
    grey = images // 4 * 2
    with torch.inference_mode():
        assert torch.allclose(segmenter.logits(grey), segmenter.logits(grey // 2 + 60))


def test_damaged_models_are_refused(saved):
    _, folder = saved
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = config.read_text()
    for text in ("[", '{"image_size": 33}', whole.replace("32", "30"), whole.replace("8", "12")):
        config.write_text(text)
        with pytest.raises(CheckpointError):
            load_segmenter(start(0, "fp64"), folder)
    config.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot read its model"):
        load_segmenter(start(0, "fp64"), folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot read its model"):
        load_segmenter(start(0, "fp64"), folder)
