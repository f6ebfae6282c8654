"""The training loop: what is learned, at which rate, from which images, and what is refused."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from case import SETTINGS, STEPS, side_of, task_of
from transformers import get_cosine_schedule_with_warmup

from chest.core.errors import ParameterError
from chest.data.dataset import Dataset
from chest.training import loop
from chest.training.checkpointing import States
from chest.training.classification import Selection
from chest.training.loop import check_schedule, learning_rate, make_optimizer, train


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def learn(task):
    return train(task, 5, States("x", {}), lambda row: None)


def accuracy(task, split):
    data = task.objective.data
    rows = data.rows(split)
    return (task.objective.predict(rows).argmax(1) == data.targets()[rows]).mean()


def test_it_learns_and_the_curve_says_so(checkpoint):
    task, logged = task_of(checkpoint, epochs=8), []
    curve, _ = train(task, 5, States("x", {}), logged.append)
    assert list(curve) == [
        "epoch",
        "train_loss",
        "val_loss",
        "learning_rate",
        "val_uar",
        "val_war",
        "val_within",
        "val_worst",
    ]
    assert [*curve["epoch"]] == [*range(1, 9)]
    assert pd.DataFrame(logged).equals(curve)
    assert curve["train_loss"].iloc[-1] < curve["train_loss"].iloc[0] / 2
    assert accuracy(task, "test") == 1


def test_the_weights_of_the_best_epoch_remain(checkpoint):
    task = task_of(checkpoint, lr=0.02, epochs=5, select_by="uar")  # a rate that jumps about
    curve, best = learn(task)
    order = curve.round(6).sort_values(["val_uar", "val_loss"], ascending=[False, True])
    assert best == order["epoch"].iloc[0]
    assert accuracy(task, "val") == curve["val_war"][best - 1]
    assert curve["val_loss"].nunique() == 5


def test_only_training_images_are_learned_from(checkpoint, monkeypatch):
    task, learned = task_of(checkpoint), []
    draw_share = loop.draw_share

    def spy(*arguments):
        batches, changes = draw_share(*arguments)
        learned.extend(batches.ravel().tolist())
        return batches, changes

    monkeypatch.setattr(loop, "draw_share", spy)
    learn(task)
    assert len(learned) == 3 * 36
    assert set(learned) <= set(task.objective.data.rows("train").tolist())


def test_batches_differ_between_epochs_and_processes_share_them(checkpoint):
    task = task_of(checkpoint)
    first, again, second = (loop.draw_share(task, np.random.default_rng([5, e])) for e in (0, 0, 1))
    assert np.array_equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not np.array_equal(first[0], second[0])

    def share(process):
        facts = {"process_index": process, "num_processes": 2, "device": "cpu"}
        accelerator = SimpleNamespace(**facts, float_type=torch.float32)
        part = replace(task, accelerator=accelerator)
        return loop.draw_share(part, np.random.default_rng([5, 0]))

    for whole, *parts in zip(first, share(0), share(1), strict=True):
        assert np.array_equal(whole[:, 0::2], parts[0])
        assert np.array_equal(whole[:, 1::2], parts[1])


def test_small_parts_of_a_batch_give_its_gradient(checkpoint):
    weights = []
    for micro_batch in (None, 4, 1):
        task = task_of(checkpoint, micro_batch=micro_batch, epochs=1, warmup_steps=0)
        learn(task)
        weights.append(torch.cat([x.flatten() for x in task.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert torch.allclose(weights[0], weights[2], atol=1e-5)


def test_the_rate_is_the_cosine_of_transformers(checkpoint):
    task = task_of(checkpoint)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=task.settings.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, task.settings.warmup_steps, task.total)
    for step in range(task.total):
        assert learning_rate(task, step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_biases_and_norms_do_not_decay(checkpoint):
    task = task_of(checkpoint, weight_decay=0.3)
    groups = make_optimizer(task.model, task.settings).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(task.model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "norm" in name else 0.3)


def test_the_adjusted_loss_takes_the_class_shares_out_of_the_logits(checkpoint, monkeypatch):
    # Noise, eleven images of one class to one of the other: there is only the frequency to learn.
    label = ["covid19"] * 44 + ["tuberculosis"] * 4
    split = [("train", "val")[i % 2] for i in range(48)]
    table = pd.DataFrame({"image_id": range(48), "label": label, "modality": "ct", "split": split})
    side = side_of(checkpoint)
    noise = np.random.default_rng(0).integers(0, 256, (48, side, side)).astype(np.uint8)
    monkeypatch.setattr(Selection, "best_epoch", lambda _, curve: len(curve))
    odds = {}
    for balance in ("none", "logit_adjusted"):
        task = task_of(checkpoint, Dataset(table, noise), balance=balance, epochs=12)
        train(task, 5, States(balance, {}), lambda row: None)
        covid19, _, tuberculosis = task.objective.predict(np.arange(48)).mean(0)
        odds[balance] = tuberculosis - covid19
    assert odds["none"] < -1
    assert odds["logit_adjusted"] - odds["none"] == pytest.approx(math.log(11), abs=1)


# --- What is refused -------------------------------------------------------------------------


def test_a_warm_up_longer_than_the_training(checkpoint):
    check_schedule(task_of(checkpoint, warmup_steps=3 * STEPS))
    with pytest.raises(ParameterError, match=r"x\.warmup_steps: 19, but the training has 18 steps"):
        learn(task_of(checkpoint, warmup_steps=19))


def test_a_batch_that_cannot_be_dealt_evenly(checkpoint):
    task = replace(task_of(checkpoint), accelerator=SimpleNamespace(num_processes=4))
    with pytest.raises(ParameterError, match="batch_size: 6 is not divisible by the 4 processes"):
        check_schedule(task)


def test_a_batch_too_large_for_the_memory(checkpoint, monkeypatch):
    def burst(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(loop, "train_step", burst)
    with pytest.raises(ParameterError, match="micro_batch: 6 images at a time do not fit"):
        learn(task_of(checkpoint))


def test_another_runtime_error_is_a_bug_and_passes(checkpoint, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        learn(task_of(checkpoint))


def test_a_loss_that_is_not_finite(checkpoint, monkeypatch):
    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a: train_step(*a) * math.nan)
    rate = SETTINGS["lr"]
    with pytest.raises(ParameterError, match=f"lr: {rate}, but the loss of epoch 1 is not finite"):
        learn(task_of(checkpoint))
