"""Training: our loop against the Hugging Face Trainer, and against the model's steps alone."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from architectures import HALF, SIDE, make_classifier
from measure import Row, peak_memory, seconds, time_in_turn
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from chest import training
from chest.compute import start, to_pixels
from chest.dataset import Dataset
from chest.labels import LABELS
from chest.params import FinetuneSiglip
from chest.resident import place_images


@dataclass(frozen=True)
class Sizes:
    """How many images train and validate, for how many epochs; the pictures' side in files."""

    train: int
    val: int
    epochs: int
    side: int
    batch: int
    repeats: int


SIZES = {
    "full": Sizes(13_040, 1_630, 10, 512, 32, 1),
    "small": Sizes(320, 32, 1, 512, 32, 3),
    "tiny": Sizes(24, 6, 1, 64, 4, 1),
}
LIGHT = {"rotate": 10.0, "shift": 0.05, "scale": 0.1, "contrast": 0.2}


def settings(sizes: Sizes, **changes) -> FinetuneSiglip:
    """The study's, but for the sizes."""
    values = {
        "checkpoint": "random", "revision": "main", "lr": 2e-5, "warmup_steps": 0,
        "batch_size": sizes.batch, "epochs": sizes.epochs, "weight_decay": 0.01,
        "balance": "class_modality", "augment": LIGHT, "calibrate": "none", "compile": "none",
        "save_every": 10**9,
    }  # fmt: skip
    return FinetuneSiglip(**{**values, **changes})


def make_data(sizes: Sizes) -> Dataset:
    """Random images of all three classes."""
    n = sizes.train + sizes.val
    table = pd.DataFrame({
        "image_id": range(n), "label": np.resize(LABELS, n),
        "modality": np.resize(["ct", "ct", "xray"], n),
        "split": ["train"] * sizes.train + ["val"] * sizes.val,
    })  # fmt: skip
    rng = np.random.default_rng(0)
    return Dataset(table, rng.integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8))


def make_task(size: str, data: Dataset, **changes) -> training.Task:
    accelerator = start(0)
    model = make_classifier(size).to(accelerator.device)
    images = place_images(data.images, accelerator.device)
    return training.Task(accelerator, model, data, images, HALF, settings(SIZES[size], **changes))


def measure_training(size: str) -> list[Row]:
    """Whole trainings, validation included; the share of data handling; torch.compile."""
    sizes = SIZES[size]
    data = make_data(sizes)
    images = sizes.train * sizes.epochs
    rows = [share_of_data(size, data)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(data, sizes, Path(folder))
        memory = peak_memory(lambda: train_ours(size, data))  # warms up, too
        times = time_in_turn(
            lambda: train_ours(size, data), lambda: train_theirs(size, data, paths),
            sizes.repeats, images,
        )  # fmt: skip
        name = f"Training, SigLIP {size}, batch {sizes.batch}, {sizes.epochs} epochs"
        opponent = "Hugging Face Trainer, DataLoader on PNG files"
        rows.append(Row(name, opponent, images, "images", *times, memory))
    modes = {"tiny": (), "small": ("default",), "full": ("default", "reduce-overhead")}[size]
    rows += [compiled(size, data, mode) for mode in modes]
    return rows


def train_ours(size: str, data: Dataset, **changes) -> None:
    training.train(make_task(size, data, **changes), 0, lambda row: None)


def share_of_data(size: str, data: Dataset) -> Row:
    """An epoch of ours against as many steps of the same model on one batch that is there."""
    sizes = SIZES[size]
    task = make_task(size, data)
    steps = sizes.train // sizes.batch
    plan = training.make_plan(task.settings, sizes.train, 1)
    run = training.begin(task, plan, 0)
    parallel, optimizer = task.accelerator.prepare(task.model, run.optimizer)
    drawn = np.arange(steps * sizes.batch).reshape(steps, sizes.batch)

    def epoch() -> None:
        run.step = 0
        training.train_epoch(task, run, parallel, optimizer, drawn, lambda: "")

    pixels = to_pixels(task.images.take(drawn[0]), HALF)
    targets = torch.from_numpy(data.targets()[drawn[0]]).to(pixels.device)

    def bare() -> None:
        parallel.train()
        for _ in range(steps):
            with task.accelerator.autocast():
                loss = cross_entropy(parallel(pixel_values=pixels).logits.float(), targets)
            task.accelerator.backward(loss)
            task.accelerator.clip_grad_norm_(parallel.parameters(), training.MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()

    seconds(bare)  # the first steps choose kernels
    times = time_in_turn(epoch, bare, max(3, sizes.repeats), steps)
    name = f"Training step, SigLIP {size}, batch {sizes.batch}"
    return Row(name, "the same model on one resident batch", steps, "steps", *times)


def compiled(size: str, data: Dataset, mode: str) -> Row:
    """torch.compile against none: the second training, its compilation behind it."""
    torch.compiler.reset()
    cold = seconds(lambda: train_ours(size, data, compile=mode, epochs=1))
    plain, fast = (epochs_of(size, data, compile=m) for m in ("none", mode))
    n = SIZES[size].train
    times = time_in_turn(fast, plain, max(3, SIZES[size].repeats), n)
    note = f"cold, with one epoch: {cold:.0f} s"
    name = f"Training epoch, SigLIP {size}, torch.compile {mode}"
    return Row(name, "ours, not compiled", n, "images", *times, note)


def epochs_of(size: str, data: Dataset, **changes):
    """A function that trains one more epoch of a model that is warm."""
    task = make_task(size, data, **changes)
    rows = data.rows("train")
    plan = training.make_plan(task.settings, len(rows), 1)
    run = training.begin(task, plan, 0)
    if task.settings.compile != "none":
        task.model.compile(mode=task.settings.compile)
    parallel, optimizer = task.accelerator.prepare(task.model, run.optimizer)
    drawn = np.resize(rows, (plan.steps, task.settings.batch_size))

    def epoch() -> None:
        run.step = 0
        training.train_epoch(task, run, parallel, optimizer, drawn, lambda: "")
        training.validate(task)

    seconds(epoch)
    return epoch


# --- The opponent ----------------------------------------------------------------------------


class Pictures(TorchDataset):
    """PNG files, decoded, resized and normalized by a worker: what most projects do."""

    def __init__(self, paths: list[Path], targets: np.ndarray):
        self.paths, self.targets = paths, targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict:
        picture = Image.open(self.paths[i]).convert("RGB")
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels, "labels": int(self.targets[i])}


def write_pictures(data: Dataset, sizes: Sizes, folder: Path) -> list[Path]:
    """The images as PNG files of `sizes.side` px; a few hundred, which many rows share."""
    files = []
    for i in range(min(len(data.table), 400)):
        files.append(folder / f"{i}.png")
        smooth = Image.fromarray(data.images[i][::16, ::16].copy())
        smooth.resize((sizes.side, sizes.side), Image.Resampling.BICUBIC).save(files[-1])
    return [files[i % len(files)] for i in range(len(data.table))]


def train_theirs(size: str, data: Dataset, paths: list[Path]) -> None:
    """The same model, batch, precision, schedule; its loader has a process a core, as usual."""
    sizes, targets = SIZES[size], data.targets()
    parts = [
        Pictures([paths[i] for i in data.rows(split)], targets[data.rows(split)])
        for split in ("train", "val")
    ]
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=sizes.batch,
            per_device_eval_batch_size=2 * sizes.batch, num_train_epochs=sizes.epochs,
            learning_rate=2e-5, weight_decay=0.01, lr_scheduler_type="cosine",
            bf16=cuda, use_cpu=not cuda, eval_strategy="epoch", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_num_workers=len(os.sched_getaffinity(0)),
        )  # fmt: skip
        model = make_classifier(size)
        trainer = Trainer(model, arguments, train_dataset=parts[0], eval_dataset=parts[1])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
