"""synthesize: what it writes, from which images, resuming; and training with what it made."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from case import SYSTEM, draw, write_case
from diffusers.training_utils import EMAModel
from processes import forked, run_in_two_processes
from support import failure, run_stage, write_params

from chest.core.errors import ParameterError
from chest.core.params import load_params
from chest.data.dataset import MANIFEST_COLUMNS, read_dataset
from chest.data.synthetic import (
    AUDIT_COLUMNS,
    SYNTHETIC_AUDIT,
    read_synthetic,
    write_synthetic,
)
from chest.models import diffusion
from chest.models.common.device import start
from chest.models.diffusion import Generator, load_generator
from chest.training import loop
from chest.training.classification import TrainingSettings
from chest.training.finetuning import set_up, training_rows

SIDE, SMALL = 16, 12
SETTINGS = {
    "method": "diffusion",
    "modality": "xray",
    "classes": ["tuberculosis", "covid19"],  # no X-ray shows the second one
    "per_class": 5,
    "strong": {"rotate": 20.0, "shift": 0.1, "scale": 0.2, "contrast": 0.5},
    "image_size": SIDE,
    "patch": 2,
    "channels": [8, 16],
    "blocks": 1,
    "lr": 1e-2,
    "warmup_steps": 2,
    "batch_size": 6,
    "epochs": 3,
    "weight_decay": 0.0,
    "augment": {"rotate": 3.0, "shift": 0.02, "scale": 0.03, "contrast": 0.05},
    "compile": "none",
    "save_every": 4,
    "ema": 0.9,
    "guidance": 2.0,
    "sampling_steps": 4,
    "sampling_batch": 3,
}
MODEL = Path("models/synthesize")
SYNTHETIC = [Path("data/synthetic") / name for name in ("16.npy", "12.npy", "manifest.csv")]
WEIGHTS = MODEL / "diffusion_pytorch_model.safetensors"


def write_inputs(folder, **changes):
    """Write params.yaml, manifest, split and packed images to `folder`."""
    write_params(folder, **{"phantom.synthesize": SETTINGS | changes})
    data = draw(SIDE)
    manifest = data.table.reindex(columns=list(MANIFEST_COLUMNS), fill_value="x")
    (folder / "data/images").mkdir(parents=True, exist_ok=True)
    manifest.to_csv(folder / "data/manifest.csv", index=False)
    data.table[["image_id", "split"]].to_csv(folder / "data/split.csv", index=False)
    for side in (SIDE, SMALL):
        np.save(folder / f"data/images/{side}.npy", data.images[:, :side, :side])
    return data


@pytest.fixture
def case(tmp_path, monkeypatch):
    """A working directory with the inputs of the stage."""
    monkeypatch.chdir(tmp_path)
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory):
    """Folder in which the stage ran uninterrupted; to be read only."""
    folder = tmp_path_factory.mktemp("peaceful")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage("synthesize")
    return folder


def made(folder=Path()):
    return {name: (folder / name).read_bytes() for name in [*SYNTHETIC, WEIGHTS]}


def tuberculosis(data):
    table = data.table
    chosen = (table["split"] == "train") & (table["label"] == "tuberculosis")
    return data.images[chosen]


# --- What is written, and from what -----------------------------------------------------------


def test_images_manifest_and_model_agree(peaceful, monkeypatch):
    monkeypatch.chdir(peaceful)
    table, images = read_synthetic(SIDE)
    assert images.shape == (5, SIDE, SIDE)
    assert read_synthetic(SMALL)[1].shape == (5, SMALL, SMALL)
    assert {*table["label"]} == {"tuberculosis"}
    assert table["seed"].is_unique
    assert table.iloc[0][["modality", "method", "guidance"]].tolist() == [
        "xray",
        "diffusion",
        "2.0",
    ]
    generator = load_generator(start(0, "fp64"), MODEL)
    again = generator.sample([int(table["seed"][3])], [2], 2.0, SETTINGS["sampling_steps"])
    assert np.array_equal(again[0], images[3])
    curve = pd.read_csv(MODEL / "training.csv")
    assert curve["val_loss"].iloc[-1] < curve["val_loss"].iloc[0]
    assert not Path(".resume/synthesize").exists()


def test_the_samples_look_like_their_class(case):
    # Tuberculosis is bright on the left, a normal X-ray on the right.
    write_inputs(Path(), epochs=1, epoch_steps=80, augment=None, sampling_steps=10, guidance=1.0)
    images = np.full((len(case.table), SIDE, SIDE), 50, np.uint8)
    for half, label in ((slice(8), "tuberculosis"), (slice(8, None), "normal")):
        images[np.flatnonzero(case.table["label"] == label)[:, None], :, half] = 200
    np.save(f"data/images/{SIDE}.npy", images)
    run_stage("synthesize")
    means = read_synthetic(SIDE)[1].mean((0, 1))
    assert means[:8].mean() > means[8:].mean() + 50


def test_no_image_outside_the_training_split_matters(case, peaceful):
    others = (case.table["split"] != "train").to_numpy()
    for side in (SIDE, SMALL):
        images = np.load(f"data/images/{side}.npy")
        noise = np.random.default_rng(1).integers(0, 256, images.shape)
        images[others] = noise[others]
        np.save(f"data/images/{side}.npy", images)
    run_stage("synthesize")
    assert made() == made(peaceful)


def test_samples_do_not_depend_on_their_batch(case, peaceful):
    write_inputs(Path(), sampling_batch=1, micro_batch=2)
    run_stage("synthesize")
    assert np.array_equal(read_synthetic(SIDE)[1], np.load(peaceful / SYNTHETIC[0]))


@forked
def test_two_processes_make_what_one_makes(case, peaceful):
    run_in_two_processes("synthesize")
    difference = read_synthetic(SIDE)[1] - np.load(peaceful / SYNTHETIC[0]).astype(int)
    assert np.abs(difference).max() <= 1


def test_the_other_methods_rearrange_training_images(case):
    real = {image.tobytes() for image in tuberculosis(case)}
    found = {}
    for method in ("duplicates", "augmented", "mixup"):
        write_inputs(Path(), method=method, per_class=12)
        run_stage("synthesize")
        table, found[method] = read_synthetic(SIDE)
        assert {*table["method"]} == {method}
    copies = [image.tobytes() for image in found["duplicates"]]
    assert {*copies} == real
    assert max(map(copies.count, copies)) == 2  # 12 copies of 9 images
    assert not {image.tobytes() for image in found["augmented"]} & real
    between = found["mixup"].astype(int)
    assert (between >= tuberculosis(case).min(0)).all()
    assert (between <= tuberculosis(case).max(0)).all()
    assert len({image.tobytes() for image in found["mixup"]}) == 12


def test_of_nothing_empty_files_are_written_without_training(case, monkeypatch):
    monkeypatch.setattr(loop, "train", None)
    write_inputs(Path(), per_class=0)
    run_stage("synthesize")
    table, images = read_synthetic(SIDE)
    assert (len(table), images.shape) == (0, (0, SIDE, SIDE))


def test_a_side_that_the_network_cannot_halve_or_that_was_not_packed(case, capsys):
    write_inputs(Path(), image_size=14)
    assert "image_size: 14 is no multiple of 4" in failure("synthesize", capsys)
    write_inputs(Path(), image_size=32)
    assert "image_size: 32, but images are packed to 16 px" in failure("synthesize", capsys)


# --- Interrupted -----------------------------------------------------------------------------


def strike(monkeypatch, owner, function, call, stage="synthesize"):
    """Run a stage, and raise SIGTERM in the `call`-th call of a function."""
    plain, calls = getattr(owner, function), []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, struck)
        with pytest.raises(SystemExit) as end:
            run_stage(stage)
    assert end.value.code == 128 + signal.SIGTERM


def test_an_interrupted_training_resumes_with_its_average(case, peaceful, monkeypatch, capsys):
    strike(monkeypatch, loop, "train_step", 5)
    run_stage("synthesize")
    assert "Resuming after step 5 of 9" in capsys.readouterr().out
    assert made() == made(peaceful)


def test_an_interrupted_sampling_trains_and_samples_nothing_twice(case, peaceful, monkeypatch):
    strike(monkeypatch, Generator, "sample", 2)
    sampled, sample = [], Generator.sample
    monkeypatch.setattr(loop, "train_step", None)
    monkeypatch.setattr(
        Generator,
        "sample",
        lambda self, seeds, *a: sampled.extend(seeds) or sample(self, seeds, *a),
    )
    run_stage("synthesize")
    assert len(sampled) == 2
    assert made() == made(peaceful)


def test_the_moving_average_is_what_is_kept(case, monkeypatch):
    steps, step = [], EMAModel.step

    def spy(average, parameters):
        parameters = [*parameters]
        steps.append(parameters[0].detach().clone())
        step(average, parameters)

    monkeypatch.setattr(EMAModel, "step", spy)
    run_stage("synthesize")
    average = steps[0]
    for count, weights in enumerate(steps[1:], 1):
        decay = min((1 + count) / (10 + count), SETTINGS["ema"])
        average = decay * average + (1 - decay) * weights
    kept = next(load_generator(start(0, "fp64"), MODEL).unet.parameters())
    assert torch.allclose(kept, average)
    assert not torch.allclose(kept, steps[-1])


def test_the_encoding_of_steps_is_that_of_diffusers():
    from diffusers.models.embeddings import Timesteps

    steps = torch.tensor([0, 1, 500, 999])
    expected = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)(steps)
    assert torch.allclose(diffusion.TimeEncoding(16)(steps).float(), expected, atol=1e-4)


# --- Training with synthetic images -----------------------------------------------------------


@pytest.fixture
def trained(checkpoint, tmp_path, monkeypatch):
    """A function that writes the inputs of a fine-tuning with changed settings."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        shutil.rmtree("data", ignore_errors=True)
        write_case(tmp_path, checkpoint, **changes)
        table = pd.DataFrame({"synthetic_id": ["s0", "s1", "s2"], "label": "tuberculosis"})
        table = table.assign(modality="xray", method="duplicates", seed=0, guidance="")
        write_synthetic(table, np.full((3, 32, 32), 7, np.uint8), {32})
        return lambda: set_up(SYSTEM, SYSTEM, load_params(), TrainingSettings)

    return write


def test_synthetic_images_join_training_and_nothing_else(trained):
    plain, mixed = trained()(), trained(synthetic={"per_class": 2})()
    count = len(plain.data.table)
    assert mixed.synthetic == 2
    assert training_rows(mixed).tolist() == [*training_rows(plain), count, count + 1]
    assert (mixed.images.take(np.array([count, count + 1])) == 7).all()
    assert mixed.data.table["label"][count:].tolist() == ["tuberculosis"] * 2
    for split in ("val", "test", "external"):
        assert mixed.data.rows(split).tolist() == plain.data.rows(split).tolist()
    pd.testing.assert_frame_equal(mixed.data.table[:count], read_dataset(side=32).table)


def test_the_record_counts_them_and_the_answers_are_those_of_real_images(trained, peaceful_answers):
    trained(synthetic={"per_class": 3}, epochs=1)
    run_stage(SYSTEM)
    record = pd.read_json(f"data/predictions/{SYSTEM}.json", typ="series")
    assert record["details"]["trained_on"] == 39
    assert record["details"]["synthetic"] == 3
    answers = pd.read_csv(f"data/predictions/{SYSTEM}.csv")
    assert answers["image_id"].tolist() == peaceful_answers["image_id"].tolist()


@pytest.fixture
def peaceful_answers(checkpoint):
    table = draw(32).table
    return table[table["split"] != "train"]


def test_other_synthetic_images_start_the_training_over(trained, monkeypatch, capsys):
    trained(synthetic={"per_class": 2})
    strike(monkeypatch, loop, "train_step", 5, SYSTEM)
    table, images = read_synthetic(32)
    write_synthetic(table, images + np.uint8(1), {32})
    strike(monkeypatch, loop, "train_step", 2, SYSTEM)
    assert "step-00000005.safetensors: not resumed from, changed since" in capsys.readouterr().err


def test_a_class_of_which_only_copies_were_made_is_refused(trained):
    set_up_again = trained(synthetic={"per_class": 1})
    table, images = read_synthetic(32)
    table = table.assign(method="diffusion", label=["tuberculosis", "tuberculosis", "normal"])
    write_synthetic(table, images, {32})
    audit = table.reindex(columns=AUDIT_COLUMNS, fill_value="1")
    dropped = table["label"] == "tuberculosis"
    audit.assign(dropped=dropped).to_csv(SYNTHETIC_AUDIT, index=False)
    with pytest.raises(ParameterError, match="per_class: 1, but `synthesize` made 0"):
        set_up_again()


def test_more_than_there_are_or_a_view_with_masks_is_refused(trained):
    with pytest.raises(ParameterError, match="per_class: 4, but `synthesize` made 3"):
        trained(synthetic={"per_class": 4})()
    with pytest.raises(ParameterError, match="have no site for the adversary"):
        trained(synthetic={"per_class": 1}, adversary="site")()
    with pytest.raises(ParameterError, match="have no masks for the view"):
        trained(synthetic={"per_class": 1}, view={"visible": "lungs"})()
