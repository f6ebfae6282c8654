"""Training: our loop against the Hugging Face Trainer, and against the model's steps alone."""

import tempfile
from collections.abc import Callable
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

from chest.core.labels import LABELS
from chest.core.parallel import workers
from chest.data.dataset import Dataset
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import to_pixels
from chest.training import loop
from chest.training.settings import Augment, TrainingSettings


@dataclass(frozen=True)
class Sizes:
    """How many images train and validate, for how many epochs; the side of the picture files."""

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


class NoStates:
    """Training states that are not kept."""

    def load(self) -> None:
        return None

    def save(self, step: int, state: dict) -> None:
        pass


def make_data(sizes: Sizes) -> Dataset:
    """Return random images of all three classes."""
    n = sizes.train + sizes.val
    table = pd.DataFrame(
        {
            "image_id": range(n),
            "label": np.resize(LABELS, n),
            "modality": np.resize(["ct", "ct", "xray"], n),
            "split": ["train"] * sizes.train + ["val"] * sizes.val,
        }
    )
    images = np.random.default_rng(0).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)
    return Dataset(table, images)


def make_task(size: str, data: Dataset) -> loop.Task:
    """Return a training as the study's, but for the sizes."""
    sizes, accelerator = SIZES[size], start(0)
    settings = TrainingSettings(
        checkpoint="random",
        revision="main",
        image_size=SIDE,
        lr=2e-5,
        warmup_steps=0,
        batch_size=sizes.batch,
        epochs=sizes.epochs,
        weight_decay=0.01,
        balance="class_modality",
        augment=Augment(rotate=10.0, shift=0.05, scale=0.1, contrast=0.2),
        select_by="within",
        calibrate="none",
        compile="none",
        save_every=10**9,
    )
    model = make_classifier(size).to(accelerator.device)
    images = place_images(data.images, accelerator.device)
    return loop.Task("study.finetune_siglip", settings, accelerator, model, data, images, HALF)


def measure_training(size: str) -> list[Row]:
    """Time whole trainings, validation included, and the share of data handling."""
    sizes = SIZES[size]
    data = make_data(sizes)
    images = sizes.train * sizes.epochs
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(data, sizes, Path(folder))
        memory = peak_memory(lambda: train_ours(size, data))  # warms up, too
        times = time_in_turn(
            lambda: train_ours(size, data),
            lambda: train_theirs(size, data, paths),
            sizes.repeats,
            images,
        )
    name = f"Training, SigLIP {size}, batch {sizes.batch}, {sizes.epochs} epochs"
    opponent = "Hugging Face Trainer, DataLoader on PNG files"
    return [
        share_of_data(size, data),
        Row(name, opponent, images, "images", *times, memory),
    ]


def train_ours(size: str, data: Dataset) -> None:
    loop.train(make_task(size, data), 0, NoStates(), lambda row: None)


def epoch_of(task: loop.Task) -> tuple[Callable[[], None], torch.nn.Module, object]:
    """Return a function that trains an epoch, and the model and optimizer that it uses."""
    state = loop.begin(task, NoStates())
    parallel, optimizer = task.accelerator.prepare(task.model, state.optimizer)

    def epoch() -> None:
        state.step = 0
        for _ in loop.train_epoch(task, state, parallel, optimizer, np.random.default_rng(0)):
            pass

    return epoch, parallel, optimizer


def share_of_data(size: str, data: Dataset) -> Row:
    """Time an epoch of ours against as many steps of the same model on one resident batch."""
    sizes, task = SIZES[size], make_task(size, data)
    epoch, parallel, optimizer = epoch_of(task)
    rows = np.arange(sizes.batch)
    pixels = to_pixels(task.images.take(rows), HALF)
    targets = torch.from_numpy(data.targets()[rows]).to(pixels.device)

    def bare() -> None:
        parallel.train()
        for _ in range(task.steps):
            with task.accelerator.autocast():
                loss = cross_entropy(parallel(pixel_values=pixels).logits.float(), targets)
            task.accelerator.backward(loss)
            task.accelerator.clip_grad_norm_(parallel.parameters(), loop.MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()

    seconds(bare)  # the first steps choose kernels
    times = time_in_turn(epoch, bare, max(3, sizes.repeats), task.steps)
    name = f"Training step, SigLIP {size}, batch {sizes.batch}"
    return Row(name, "the same model on one resident batch", task.steps, "steps", *times)


# --- The opponent ----------------------------------------------------------------------------


class Pictures(TorchDataset):
    """PNG files that a worker decodes, resizes and normalizes, as most projects do."""

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
    """Write the images as PNG files; a few hundred, which many rows share."""
    files = []
    for i in range(min(len(data.table), 400)):
        files.append(folder / f"{i}.png")
        smooth = Image.fromarray(data.images[i][::16, ::16].copy())
        smooth.resize((sizes.side, sizes.side), Image.Resampling.BICUBIC).save(files[-1])
    return [files[i % len(files)] for i in range(len(data.table))]


def train_theirs(size: str, data: Dataset, paths: list[Path]) -> None:
    """Train the same model, batch, precision and schedule; a loader process per core."""
    sizes, targets, cuda = SIZES[size], data.targets(), torch.cuda.is_available()
    train, val = (
        Pictures([paths[i] for i in data.rows(split)], targets[data.rows(split)])
        for split in ("train", "val")
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=sizes.batch,
            per_device_eval_batch_size=2 * sizes.batch,
            num_train_epochs=sizes.epochs,
            learning_rate=2e-5,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            bf16=cuda,
            use_cpu=not cuda,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=workers(),
        )
        model = make_classifier(size)
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=val)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
