"""Training of encoders: heads, adversaries and batch norms in the loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from case import SYSTEM, draw, settings, task_of, write_case
from support import run_stage

from chest.models.common.classification import ImageRows
from chest.models.common.pixels import to_pixels
from chest.training.batch_norm import estimate_statistics
from chest.training.checkpointing import States
from chest.training.loop import train


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def statistics_of(model):
    return torch.cat([x for name, x in model.named_buffers() if "running" in name])


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_batch_norms_keep_the_statistics_of_images_as_they_occur(checkpoints, name):
    task = task_of(checkpoints / name, image_size=32, batch_norm="estimated", epochs=2)
    model, images = task.model, task.images
    first = next(x for x in model.modules() if isinstance(x, torch.nn.BatchNorm2d))
    seen = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = to_pixels(images.take(task.rows), task.objective.normalization)
    with torch.no_grad():
        model.eval()(pixel_values=pixels)
    assert torch.allclose(first.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(first.running_var, seen[0].var((0, 2, 3)), rtol=1e-2)
    before = statistics_of(model).clone()
    train(task, 5, States("x", {}), lambda row: None)
    assert torch.equal(statistics_of(model), before)


def test_the_pretrained_statistics_stay_too(checkpoints):
    checkpoint = checkpoints / "resnet50"
    task = task_of(checkpoint, image_size=32, batch_norm="pretrained", epochs=1, warmup_steps=0)
    train(task, 5, States("x", {}), lambda row: None)
    means = [x for name, x in task.model.named_buffers() if "running_mean" in name]
    assert not torch.cat(means).any()  # as they were initialised


def test_estimation_does_not_depend_on_what_was_there(checkpoints):
    task = task_of(checkpoints / "resnet50", image_size=32, batch_norm="estimated")
    before = statistics_of(task.model).clone()
    data = ImageRows(task.images, task.rows, task.objective.normalization)
    estimate_statistics(task.model, data)
    assert torch.equal(statistics_of(task.model), before)


def test_heads_by_modality_learn_and_leave_no_probability_to_the_impossible(checkpoint):
    task = task_of(checkpoint, head="by_modality", epochs=8)
    train(task, 5, States("x", {}), lambda row: None)
    data = task.objective.data
    rows = data.rows("test")
    logits = task.objective.predict(rows)
    assert (logits.argmax(1) == data.targets()[rows]).mean() == 1
    ct = data.modalities()[rows] == 0
    assert np.isneginf(logits[ct, 2]).all()
    assert np.isneginf(logits[~ct, 0]).all()
    assert np.isfinite(logits).sum(1).tolist() == [2] * len(rows)


def site_case(checkpoint, **changes):
    """A task whose images show their site, by their brightness, and their class."""
    data = draw(settings(checkpoint).image_size)
    site = np.arange(len(data.table)) // 4 % 2
    data.images[site == 1] //= 3
    table = data.table.assign(site=np.array(["A", "B"])[site])
    data = type(data)(table, data.images)
    return task_of(checkpoint, data, epochs=20, lr=3e-3, **changes)


def test_an_adversary_hides_the_site_from_its_discriminator(checkpoint):
    losses = {}
    for weight in (0.0, 1.0):
        task = site_case(checkpoint, adversary="site", adversary_weight=weight)
        train(task, 5, States(f"x{weight}", {}), lambda row: None)
        objective = task.objective
        rows = objective.data.rows("train")
        features = torch.from_numpy(objective.features(rows)).float()
        logits = task.model.discriminator(features)
        losses[weight] = objective.domain_loss(logits, torch.from_numpy(rows)).item()
        answers = objective.predict(objective.data.rows("val")).argmax(1)
        assert (answers == objective.data.targets()[objective.data.rows("val")]).mean() > 0.75
    assert losses[0.0] < 0.6 < math.log(2) < losses[1.0]


def test_the_record_tells_the_site_that_remains(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "case"
    folder.mkdir()
    monkeypatch.chdir(write_case(folder, checkpoint, adversary="modality", epochs=1))
    run_stage(SYSTEM)
    details = json.loads(Path(f"data/predictions/{SYSTEM}.json").read_text())["details"]
    assert 0 <= details["discriminator_ct"] <= 1


def test_rejected_images_are_not_trained_on(checkpoint):
    data = draw(settings(checkpoint).image_size)
    accepted = np.arange(len(data.table)) % 3 > 0
    task = task_of(checkpoint, data, accepted=accepted)
    assert set(task.rows) == set(data.rows("train")) & set(np.flatnonzero(accepted))
