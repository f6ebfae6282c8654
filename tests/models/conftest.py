"""What the tests of models share: tiny checkpoints, images, and a small packed study."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import write_params

from chest.core.labels import LABELS
from chest.data.dataset import IMAGES, MANIFEST, MANIFEST_COLUMNS, SPLIT
from chest.models.common.checkpoints import find_checkpoint

SIDE = 112


@pytest.fixture
def siglip_source(checkpoints):
    return find_checkpoint(str(checkpoints / "siglip"), "main")


@pytest.fixture
def qwen_source(checkpoints):
    return find_checkpoint(str(checkpoints / "qwen"), "main")


@pytest.fixture(scope="session")
def images():
    drawn = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.fixture
def study(tmp_path, monkeypatch, checkpoints):
    """A working directory with params.yaml and 40 packed images, 30 of the test split."""
    monkeypatch.chdir(tmp_path)
    write_params(
        tmp_path,
        **{
            f"phantom.zeroshot_{name}.{key}": value
            for name in ("qwen", "siglip")
            for key, value in {
                "checkpoint": str(checkpoints / name),
                "image_size": SIDE,
                "batch_size": 16,
            }.items()
        },
    )
    table = pd.DataFrame("x", index=range(40), columns=[*MANIFEST_COLUMNS])
    table["image_id"] = [f"image-{i:02}" for i in range(40)]
    table["patient_id"] = [f"patient-{i // 2:02}" for i in range(40)]
    table["label"] = np.resize(LABELS, 40)
    table["modality"] = np.resize(["ct", "xray", "xray"], 40)
    splits = ["train"] * 5 + ["val"] * 3 + ["external"] * 2 + ["test"] * 30
    for path, content in ((MANIFEST, table), (SPLIT, table[["image_id"]].assign(split=splits))):
        path.parent.mkdir(exist_ok=True)
        content.to_csv(path, index=False)
    IMAGES.mkdir()
    drawn = np.random.default_rng(1).integers(0, 256, (40, SIDE, SIDE), dtype=np.uint8)
    np.save(IMAGES / f"{SIDE}.npy", drawn)
    return tmp_path
