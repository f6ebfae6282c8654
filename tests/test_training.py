"""Fine-tuning: plan, sampler, optimizer, schedule, and which epoch remains."""

import math
import shutil
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch

from chest import training
from chest.compute import find_checkpoint, load_normalization, start
from chest.dataset import Dataset
from chest.errors import ParameterError
from chest.labels import LABELS
from chest.metrics import classification_metrics
from chest.params import FinetuneSiglip
from chest.predictions import CURVE_COLUMNS
from chest.resident import place_images
from chest.siglip import load_classifier
from chest.training import (
    Plan,
    Task,
    draw_epoch,
    logit_adjustment,
    make_optimizer,
    make_plan,
    predict,
    sampling_weights,
    train,
)

LIGHT = {"rotate": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2}


def settings(**changes):
    values = {
        "checkpoint": "x", "revision": "main", "batch_size": 8, "lr": 1e-3, "warmup_steps": 3,
        "epochs": 3, "weight_decay": 0.01, "balance": "class_modality", "augment": None,
        "calibrate": "none", "compile": "none", "save_every": 1000,
    }  # fmt: skip
    return FinetuneSiglip(**{**values, **changes})


# --- Plan ------------------------------------------------------------------------------------


def test_the_study_takes_4080_steps():
    plan = make_plan(settings(batch_size=32, epochs=10, warmup_steps=500), 13040, 1)
    assert (plan.steps, plan.total) == (408, 4080)


def test_a_warm_up_longer_than_the_training_is_refused():
    assert make_plan(settings(warmup_steps=15), 40, 1).total == 15
    with pytest.raises(ParameterError, match=r"steps: 16, .* only 15 steps \(3 epochs of 5\)"):
        make_plan(settings(warmup_steps=16), 40, 1)


def test_a_batch_that_cannot_be_dealt_evenly_is_refused():
    with pytest.raises(ParameterError, match="8 images cannot be dealt evenly to 3 processes"):
        make_plan(settings(), 40, 3)


# --- Sampler ---------------------------------------------------------------------------------

TABLE = pd.DataFrame(
    [("covid19", "ct")] * 60 + [("normal", "ct")] * 25 + [("normal", "xray")] * 10
    + [("tuberculosis", "xray")] * 5,
    columns=["label", "modality"],
)  # fmt: skip


def shares(balance, by):
    """Expected share of each group in a batch."""
    weights = pd.Series(sampling_weights(TABLE, balance).numpy())
    return (weights.groupby([TABLE[column] for column in by]).sum() / weights.sum()).to_dict()


def test_classes_are_drawn_equally_often():
    assert shares("class", ["label"]) == pytest.approx(dict.fromkeys(LABELS, 1 / 3))


def test_classes_are_drawn_equally_often_within_each_modality():
    expected = [("covid19", "ct"), ("normal", "ct"), ("normal", "xray"), ("tuberculosis", "xray")]
    found = shares("class_modality", ["label", "modality"])
    assert found == pytest.approx(dict.fromkeys(expected, 1 / 4))


def test_what_is_drawn_is_balanced():
    weights = sampling_weights(TABLE, "class_modality")
    drawn = draw_epoch(weights, 100, Plan(500, 1, 0), 8, torch.Generator().manual_seed(0))
    counts = TABLE.iloc[drawn.ravel()].value_counts(normalize=True)
    assert counts.to_numpy() == pytest.approx([0.25] * 4, abs=0.03)


def test_without_balance_each_image_comes_once():
    assert sampling_weights(TABLE, "none") is None
    generator = torch.Generator().manual_seed(0)
    first, second = (draw_epoch(None, 100, Plan(10, 1, 0), 10, generator) for _ in range(2))
    assert first.shape == (10, 10)
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(100))
    assert (first != second).any()
    # The last batch is filled up.
    padded = draw_epoch(None, 100, Plan(13, 1, 0), 8, generator)
    assert set(padded.ravel()) == set(range(100))


def test_the_adjustment_is_the_logarithm_of_the_class_shares():
    targets = TABLE["label"].map(LABELS.index).to_numpy()
    found = logit_adjustment(targets, "logit_adjusted").exp()
    assert found.tolist() == pytest.approx([0.6, 0.35, 0.05])
    assert sampling_weights(TABLE, "logit_adjusted") is None
    for balance in ("none", "class", "class_modality"):
        assert logit_adjustment(targets, balance).tolist() == [0, 0, 0]
    # A class without images: no logarithm of 0.
    assert logit_adjustment(np.array([0, 0, 1]), "logit_adjusted").isfinite().all()


# --- Optimizer -------------------------------------------------------------------------------


def test_biases_and_norms_do_not_decay(checkpoints):
    model = load_classifier(find_checkpoint(str(checkpoints / "siglip"), "main"), 224)
    groups = make_optimizer(model, settings(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        free = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if free else 0.3), name


# --- Training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    """48 images, brighter from class to class; the last 24 are for validation and test."""
    label = np.resize(LABELS, 48)
    table = pd.DataFrame(
        {
            "image_id": [f"{i:02}" for i in range(48)], "label": label, "modality": "ct",
            "split": ["train"] * 24 + ["val"] * 12 + ["test"] * 12,
        }
    )  # fmt: skip
    rng = np.random.default_rng(0)
    level = np.array([30, 110, 190])[np.resize([0, 1, 2], 48)]
    images = rng.integers(0, 60, (48, 224, 224)) + level[:, None, None]
    return Dataset(table, images.astype(np.uint8))


def run(checkpoints, data, **changes):
    accelerator = start(5)
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    model = load_classifier(source, 224)
    images = place_images(data.images, accelerator.device)
    task = Task(accelerator, model, data, images, load_normalization(source), settings(**changes))
    logged = []
    curve, best = train(task, 5, logged.append)
    return task, curve, best, logged


def test_it_learns_and_the_curve_says_so(checkpoints, data):
    task, curve, _, logged = run(checkpoints, data, epochs=6)
    assert tuple(curve.columns) == CURVE_COLUMNS
    assert list(curve["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert pd.DataFrame(logged)[list(CURVE_COLUMNS)].equals(curve)
    assert curve["train_loss"].iloc[-1] < curve["train_loss"].iloc[0] / 2
    logits = predict(task, data.rows("test"))
    assert logits.shape == (12, 3)
    assert (logits.argmax(1) == data.targets()[data.rows("test")]).mean() > 0.9


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(checkpoints, data):
    _, curve, *_ = run(checkpoints, data, warmup_steps=4, epochs=3)  # 3 steps an epoch, 9 in all

    def rate(step):
        if step < 4:
            return 1e-3 * step / 4
        return 1e-3 * (1 + math.cos(math.pi * (step - 4) / 5)) / 2

    assert list(curve["learning_rate"]) == pytest.approx([rate(2), rate(5), rate(8)])


def test_the_best_epoch_remains(checkpoints, data):
    # A rate so high that the score jumps about.
    task, curve, best, _ = run(checkpoints, data, lr=0.02, epochs=5)
    order = curve.sort_values(["val_uar", "val_loss"], ascending=[False, True])
    assert best == order["epoch"].iloc[0]
    rows = data.rows("val")
    names = np.array(LABELS)
    said = names[predict(task, rows).argmax(1)]
    metrics = classification_metrics(names[data.targets()[rows]], said)
    assert metrics["uar"] == curve["val_uar"][best - 1]
    assert curve["val_uar"].nunique() + curve["val_loss"].nunique() > 2


def test_only_training_images_are_learned_from(checkpoints, data, monkeypatch):
    learned = []
    train_epoch = training.train_epoch

    def spy(task, run, parallel, optimizer, drawn, save):
        learned.extend(drawn.ravel().tolist())
        return train_epoch(task, run, parallel, optimizer, drawn, save)

    monkeypatch.setattr(training, "train_epoch", spy)
    run(checkpoints, data)
    assert len(learned) == 3 * 24
    assert set(learned) <= set(data.rows("train").tolist())


def test_the_same_seed_gives_the_same_run(checkpoints, data):
    (first, curve, *_), (second, again, *_) = (run(checkpoints, data) for _ in range(2))
    assert curve.equals(again)
    rows = data.rows("test")
    assert np.array_equal(predict(first, rows), predict(second, rows))


def test_the_adjusted_loss_takes_the_classes_shares_out_of_the_logits(checkpoints, monkeypatch):
    # Pictures that tell nothing, eleven of one class to one of the other: all there is to learn is
    # how common a class is.
    label = np.array(["covid19"] * 44 + ["tuberculosis"] * 4)
    split = np.resize(["train", "val"], 48)
    table = pd.DataFrame({"image_id": range(48), "label": label, "modality": "ct", "split": split})
    images = np.random.default_rng(0).integers(0, 256, (48, 224, 224)).astype(np.uint8)
    rising = count()  # the last epoch is the best one
    monkeypatch.setattr(
        training, "validate", lambda _: {"val_loss": 0, "val_uar": next(rising), "val_war": 0}
    )
    odds = {}
    for balance in ("none", "logit_adjusted"):
        task, *_ = run(checkpoints, Dataset(table, images), balance=balance, epochs=8)
        covid19, _, tuberculosis = predict(task, np.arange(48)).mean(0)
        odds[balance] = tuberculosis - covid19
    assert odds["none"] < -1
    assert odds["logit_adjusted"] - odds["none"] == pytest.approx(math.log(11), abs=1)


def test_augmented_training_is_repeatable_and_another(checkpoints, data):
    plain, augmented, again = (run(checkpoints, data, augment=a)[1] for a in (None, LIGHT, LIGHT))
    assert augmented.equals(again)
    assert not augmented.equals(plain)


# --- Faults ----------------------------------------------------------------------------------


def test_a_batch_too_large_for_the_memory_is_named(checkpoints, data, monkeypatch):
    def burst(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(training, "classify", burst)
    with pytest.raises(ParameterError, match="batch_size: 8 images do not fit into the memory"):
        run(checkpoints, data)


def test_a_loss_that_is_no_number_is_named(checkpoints, data, monkeypatch):
    classify = training.classify
    monkeypatch.setattr(training, "classify", lambda *a: classify(*a) * math.nan)
    with pytest.raises(ParameterError, match=r"lr: 0.001, but the loss is no number in epoch 1"):
        run(checkpoints, data)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_alike(checkpoints, data):
    plain, compiled = (
        run(checkpoints, data, compile=mode, epochs=2)[1] for mode in ("none", "default")
    )
    np.testing.assert_allclose(plain, compiled, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu(checkpoints, data, monkeypatch):
    train_epoch = training.train_epoch

    def watched(*arguments):
        # The step under autocast, clipping, optimizer and all: a wait is an error.
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_epoch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run(checkpoints, data, augment=LIGHT)  # what waits once does so here
    monkeypatch.setattr(training, "train_epoch", watched)
    run(checkpoints, data, augment=LIGHT)
