"""segment_lungs: what it learns and writes, resuming, and a study without published masks."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support import load_script, run_stage, write_params

from chest.data import masks
from chest.data.dataset import MANIFEST_COLUMNS, read_manifest
from chest.data.masks import dice, pack, read_masks, read_published_masks, unpack
from chest.data.pictures import resize_grey
from chest.models import lungs
from chest.models.common.device import start
from chest.models.lungs import load_segmenter

SIDE, SMALL = 64, 24
SPLITS = ["train"] * 16 + ["val"] * 4 + ["test"] * 4  # of the X-rays, then of the CT slices
SETTINGS = {
    "image_size": 48,
    "channels": [4, 8, 8, 16, 16, 4],
    "lr": 2e-2,
    "warmup_steps": 2,
    "batch_size": 4,
    "epochs": 5,
    "weight_decay": 0.01,
    "augment": {"rotate": 5, "shift": 0.05, "scale": 0.1, "contrast": 0.3, "elastic": 0.01},
    "compile": "none",
    "save_every": 3,
}
OUTPUTS = [f"data/masks/{name}" for name in ("64.npy", "24.npy", "index.csv")]
OUTPUTS += [f"models/segment_lungs/{name}" for name in ("model.safetensors", "training.csv")]


def draw():
    """Draw 24 X-rays and 6 CT slices with their lungs: uint8 and bool, (30, SIDE, SIDE)."""
    phantoms = load_script("data/draw_phantoms.py")
    images, drawn = [], []
    for number in range(30):
        rng, xray = np.random.default_rng(number), number < len(SPLITS)
        body = phantoms.make_anatomy(rng, "normal", xray, 1.0)
        look = (phantoms.MONTGOMERY if xray else phantoms.MOSCOW).vary(rng)
        if xray:
            picture = phantoms.frontal(body, 2 * SIDE, look, rng)
        else:
            picture = phantoms.axial(body, 0.5, 2 * SIDE, look, rng)
        grey = Image.fromarray(phantoms.to_bytes(picture.values, look.window))
        images.append(resize_grey(grey, SIDE))
        drawn.append(masks.resize_mask(picture.lungs, SIDE))
    return np.stack(images), np.stack(drawn)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with a manifest, split, images, and published masks of all X-rays but one."""
    folder = tmp_path_factory.mktemp("packed")
    write_params(folder, **{"phantom.segment_lungs": SETTINGS})
    images, drawn = draw()
    xray = np.arange(len(images)) < len(SPLITS)
    table = pd.DataFrame("x", index=range(len(images)), columns=[*MANIFEST_COLUMNS])
    table = table.assign(image_id=[f"{number:02}" for number in table.index], label="normal")
    table = table.assign(modality=np.where(xray, "xray", "ct"), mask=np.where(xray, "m.png", ""))
    table.loc[23, "mask"] = ""
    (folder / "data/images").mkdir(parents=True)
    table.to_csv(folder / "data/manifest.csv", index=False)
    split = table[["image_id"]].assign(split=[*SPLITS, *["test"] * 6])
    split.to_csv(folder / "data/split.csv", index=False)
    for side in (SIDE, SMALL):
        small = [resize_grey(Image.fromarray(image), side) for image in images]
        np.save(folder / f"data/images/{side}.npy", np.stack(small))
        small = [masks.resize_mask(mask, side) for mask in drawn[:23]]
        np.save(folder / f"data/images/lungs_{side}.npy", pack(np.stack(small)))
    return folder


@pytest.fixture
def case(packed, tmp_path, monkeypatch):
    """A working directory with links to the same inputs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "params.yaml").symlink_to(packed / "params.yaml")
    for path in (packed / "data").iterdir():
        if path.name != "masks":
            (tmp_path / "data" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def peaceful(packed):
    """Folder in which the stage ran uninterrupted; to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(packed)
        run_stage("segment_lungs")
    return packed


def outputs(folder=Path()):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def test_masks_index_and_model_agree(peaceful, monkeypatch):
    monkeypatch.chdir(peaceful)
    manifest = read_manifest()
    index = pd.read_csv("data/masks/index.csv", keep_default_na=False)
    assert list(index["image_id"]) == list(range(30))
    assert list(index["method"]) == ["unet"] * 24 + ["threshold"] * 6
    assert index["accepted"].mean() > 0.9

    found = unpack(read_masks(30, SIDE))
    rows, published = read_published_masks(manifest, SIDE)
    assert list(rows) == list(range(23))
    scores = [dice(found[row], unpack(published[row])) for row in rows]
    assert np.mean(scores[20:]) > 0.85  # of the test split
    assert list(index["dice"]) == [f"{score:.4f}" for score in scores] + [""] * 7
    assert np.allclose(index["area"], found.mean((1, 2)), atol=1e-4)
    small = unpack(read_masks(30, SMALL))
    assert np.array_equal(small[0], masks.resize_mask(found[0], SMALL))

    segmenter = load_segmenter(start(0, "fp64"), Path("models/segment_lungs"))
    images = torch.from_numpy(np.load(f"data/images/{SIDE}.npy")[:24])
    assert np.array_equal(segmenter.segment(images), found[:24])
    assert not Path(".resume/segment_lungs").exists()


def test_an_interrupted_stage_trains_and_segments_nothing_twice(
    case, peaceful, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(masks, "segment_ct", lambda image: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            run_stage("segment_lungs")
    assert end.value.code == 128 + signal.SIGTERM
    assert "the next run resumes" in capsys.readouterr().err
    assert not Path("data/masks").exists()
    monkeypatch.setattr(lungs, "keep_lungs", None)  # which all X-rays have passed
    run_stage("segment_lungs")
    assert outputs() == outputs(peaceful)


def test_without_published_masks_only_ct_gets_masks(case):
    shutil.copytree("data/images", "copy")
    Path("data/images").unlink()
    Path("copy").rename("data/images")
    np.save(f"data/images/lungs_{SIDE}.npy", np.zeros(masks.packed_shape(0, SIDE), np.uint8))
    manifest = read_manifest().assign(mask="")
    Path("data/manifest.csv").unlink()
    manifest.to_csv("data/manifest.csv", index=False)
    run_stage("segment_lungs")
    index = pd.read_csv("data/masks/index.csv", keep_default_na=False)
    assert list(index["method"]) == ["none"] * 24 + ["threshold"] * 6
    assert not index["accepted"][:24].any()
    assert not unpack(read_masks(30, SIDE))[:24].any()
    assert [path.name for path in Path("models/segment_lungs").iterdir()] == ["training.csv"]
