"""audit_synthetic: it finds copies in images, and training leaves out what it drops."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support import run_stage, write_params

from chest.core.errors import InputError
from chest.core.labels import LABELS
from chest.data.dataset import MANIFEST_COLUMNS
from chest.data.synthetic import (
    AUDIT_COLUMNS,
    SYNTHETIC_AUDIT,
    read_kept,
    read_synthetic,
    write_synthetic,
)
from chest.evaluation.synthetic import FIGURES

SIDE, N = 56, 60


@pytest.fixture
def images(tmp_path, monkeypatch, checkpoints):
    """A working directory with N packed X-rays of noise; return the images."""
    monkeypatch.chdir(tmp_path)
    changes = {"checkpoint": str(checkpoints / "resnet50"), "image_size": SIDE}
    write_params(tmp_path, **{f"phantom.audit_synthetic.{key}": x for key, x in changes.items()})
    table = pd.DataFrame("x", index=range(N), columns=list(MANIFEST_COLUMNS))
    table["image_id"] = table["patient_id"] = [f"image-{i:02}" for i in range(N)]
    table = table.assign(label="tuberculosis", modality="xray")
    Path("data/images").mkdir(parents=True)
    table.to_csv("data/manifest.csv", index=False)
    splits = ["train"] * 34 + ["val"] * 12 + ["test"] * 12 + ["external"] * 2
    table[["image_id"]].assign(split=splits).to_csv("data/split.csv", index=False)
    images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE), np.uint8)
    np.save(f"data/images/{SIDE}.npy", images)
    return images


def write_made(images, methods):
    """Write synthetic tuberculosis X-rays, one of each of `methods`."""
    table = pd.DataFrame({"synthetic_id": [f"s{i:02}" for i in range(len(methods))]})
    table = table.assign(label=LABELS[2], modality="xray", method=methods, seed=0, guidance="")
    write_synthetic(table, images, {SIDE})


def test_copies_of_training_images_are_found_and_dropped(images):
    new = np.random.default_rng(1).integers(0, 256, (12, SIDE, SIDE), np.uint8)
    made = np.concatenate([images[:12], images[20:24], new])
    write_made(made, ["duplicates"] * 12 + ["diffusion"] * 16)
    run_stage("audit_synthetic")
    found = pd.read_csv(SYNTHETIC_AUDIT)
    assert tuple(found.columns) == AUDIT_COLUMNS
    copied = [f"image-{i:02}" for i in (*range(12), *range(20, 24))]
    assert found["near_copy"][:16].all()
    for column in ("nearest", "hash_nearest"):
        assert found[column][:16].tolist() == copied
    assert {*found["test_nearest"]} <= {f"image-{i}" for i in range(46, 58)}
    assert not found["dropped"][:12].any()
    assert found["dropped"][12:16].all()

    figures = json.loads(FIGURES.read_text())
    duplicates, own = (figures[x]["tuberculosis_xray"] for x in ("duplicates", "diffusion"))
    assert duplicates["near_by_hash"] == duplicates["near_by_features"] == duplicates["n"] == 12
    assert own["dropped"] == found["dropped"].sum() == own["near_by_features"]
    assert own["held_out"] == 12
    assert {*own["floor"]} == {"kid", "kid_sd", "precision", "recall", "probe_auroc"} < {*own}

    table, made = read_synthetic(SIDE)
    chosen = read_kept(table)
    table, kept = table[chosen], made[chosen]
    assert len(table) == len(kept) == 28 - own["dropped"]
    assert not {image.tobytes() for image in kept} & {image.tobytes() for image in images[20:24]}

    first = [path.read_bytes() for path in (SYNTHETIC_AUDIT, FIGURES)]
    run_stage("audit_synthetic")
    assert [path.read_bytes() for path in (SYNTHETIC_AUDIT, FIGURES)] == first


def test_validation_and_external_images_are_no_candidates(images):
    write_made(images[[34, 58]], ["diffusion"] * 2)
    run_stage("audit_synthetic")
    assert (pd.read_csv(SYNTHETIC_AUDIT)["bits"] > 24).all()
    assert "kid" not in json.loads(FIGURES.read_text())["diffusion"]["tuberculosis_xray"]


def test_of_no_images_there_is_an_empty_audit(images):
    write_made(images[:0], [])
    run_stage("audit_synthetic")
    assert json.loads(FIGURES.read_text()) == {"n": 0}
    assert len(read_kept(read_synthetic(SIDE)[0])) == 0


def test_an_audit_of_other_images_is_refused(images):
    write_made(images[:2], ["diffusion"] * 2)
    run_stage("audit_synthetic")
    write_made(images[:3], ["diffusion"] * 3)
    with pytest.raises(InputError, match="other images"):
        read_kept(read_synthetic(SIDE)[0])
