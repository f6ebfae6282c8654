"""A small training case: drawn images of three classes, and the files that the stage reads."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator
from support import write_params

from chest.data.dataset import MANIFEST_COLUMNS, Dataset
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.training.classification import TrainingSettings
from chest.training.finetuning import Setup, load_classification, make_task
from chest.training.loop import Task

SYSTEM, ZEROSHOT = "finetune_siglip", "zeroshot_siglip"
AUGMENT = {"rotate": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2}
SETTINGS = {
    "lr": 1e-3,
    "warmup_steps": 3,
    "batch_size": 6,
    "epochs": 3,
    "weight_decay": 0.01,
    "balance": "class_modality",
    "augment": AUGMENT,
    "view": {},
    "weights": "pretrained",
    "head": "shared",
    "adversary": "none",
    "adversary_lr": 1e-2,
    "adversary_weight": 1.0,
    "adversary_ramp": 10.0,
    "select_by": "within",
    "calibrate": "temperature",
    "compile": "none",
    "save_every": 4,
}
GROUPS = [("covid19", "ct"), ("normal", "ct"), ("normal", "xray"), ("tuberculosis", "xray")]
SPLITS = ["train"] * 36 + ["val"] * 16 + ["test"] * 8 + ["external"] * 4
STEPS = 6  # of an epoch
OUTPUTS = (
    f"data/predictions/{SYSTEM}.csv",
    f"data/predictions/{SYSTEM}.json",
    f"data/training/{SYSTEM}.csv",
    f"models/{SYSTEM}/model.safetensors",
)


def settings(checkpoint: Path, **changes) -> TrainingSettings:
    """Return SETTINGS for a checkpoint, with changes."""
    where = {"checkpoint": str(checkpoint), "revision": "main"}
    if "image_size" not in changes:
        where["image_size"] = side_of(checkpoint)
    return TrainingSettings(**where | SETTINGS | changes)


def task_of(
    checkpoint: Path,
    data: Dataset | None = None,
    accelerator: Accelerator | None = None,
    accepted: np.ndarray | None = None,
    **changes,
) -> Task:
    """Return the training of a classifier on `data` (default: drawn), with changed SETTINGS."""
    chosen = settings(checkpoint, **changes)
    data, accelerator = data or draw(chosen.image_size), accelerator or start(5, "fp32")
    setup = Setup(
        system="x",
        key="phantom.x",
        params=None,
        settings=chosen,
        accelerator=accelerator,
        source=find_checkpoint(str(checkpoint), "main"),
        data=data,
        images=place_images(data.images, accelerator.device),
        accepted=np.ones(len(data.table), bool) if accepted is None else accepted,
    )
    return make_task(setup, *load_classification(setup))


def side_of(checkpoint: Path) -> int:
    """Return the side of the checkpoint's images in px."""
    return json.loads((checkpoint / "config.json").read_text())["vision_config"]["image_size"]


def draw(side: int, seed: int = 0) -> Dataset:
    """Draw 64 noisy images with stripes, whose direction differs from group to group."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (len(SPLITS), side, side))
    groups = [i % len(GROUPS) for i in range(len(SPLITS))]
    rows, columns = np.mgrid[:side, :side]
    stripes = [rows * 0, rows, columns, rows + columns]
    for image, group in zip(images, groups, strict=True):
        image += 100 * (stripes[group] // 2 % 2)
    label, modality = zip(*(GROUPS[group] for group in groups), strict=True)
    table = pd.DataFrame({"image_id": [f"i{i:02}" for i in range(len(SPLITS))]})
    table = table.assign(label=label, modality=modality, split=SPLITS)
    return Dataset(table, images.astype(np.uint8))


def write_case(folder: Path, checkpoint: Path, **changes) -> Path:
    """Write params.yaml, manifest, split and packed images to `folder`, and return it."""
    chosen = settings(checkpoint, **changes).model_dump()
    zeroshot = {key: chosen[key] for key in ("checkpoint", "image_size")}
    changes = {f"phantom.{ZEROSHOT}.{key}": value for key, value in zeroshot.items()}
    write_params(folder, **{f"phantom.{SYSTEM}": chosen}, **changes)
    data = draw(chosen["image_size"])
    manifest = data.table.assign(**{name: "x" for name in MANIFEST_COLUMNS[4:]})
    manifest = manifest.assign(path=data.table["image_id"], width="1", height="1")
    (folder / "data" / "images").mkdir(parents=True)
    manifest[list(MANIFEST_COLUMNS)].to_csv(folder / "data/manifest.csv", index=False)
    data.table[["image_id", "split"]].to_csv(folder / "data/split.csv", index=False)
    np.save(folder / f"data/images/{chosen['image_size']}.npy", data.images)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    """Return the content of all files that the stage writes."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS}
