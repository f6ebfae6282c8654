"""Training: our loop against the Hugging Face Trainer, and each system at its full size."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from architectures import SIDE, make_reader, write_encoder
from measure import Row, peak_memory, seconds
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from chest.core.labels import LABELS
from chest.core.parallel import workers
from chest.core.params import load_params
from chest.data.dataset import Dataset
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.encoders import load_classifier
from chest.models.vlm.asking import VlmPrompts
from chest.training import loop
from chest.training import vlm as vlm_training
from chest.training.classification import TrainingSettings
from chest.training.finetuning import Setup, load_classification, make_task
from chest.training.vlm import AnswerObjective, VlmTrainingSettings, load_reader

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)
SYSTEMS = {
    "siglip": "study.finetune_siglip",
    "resnet50": "study.finetune_cnn.resnet50",
    "efficientnet_b0": "study.finetune_cnn.efficientnet_b0",
}


@dataclass(frozen=True)
class Sizes:
    """How many images train and validate, in one epoch; the side of the picture files.

    ``asked``: how many of them train and validate a vision-language model.
    """

    train: int
    val: int
    asked: int
    side: int
    batch: int
    repeats: int


SIZES = {
    "full": Sizes(2_560, 256, 256, 512, 32, 3),
    "small": Sizes(320, 32, 64, 512, 32, 5),
    "tiny": Sizes(8, 4, 4, 64, 4, 1),
}


class NoStates:
    """Training states that are not kept."""

    def load(self) -> None:
        return None

    def save(self, step: int, state: dict) -> None:
        pass


def make_data(train: int, val: int) -> Dataset:
    """Return random images of all three classes."""
    n = train + val
    table = pd.DataFrame(
        {
            "image_id": range(n),
            "label": np.resize(LABELS, n),
            "modality": np.resize(["ct", "ct", "xray"], n),
            "site": "x",
            "split": ["train"] * train + ["val"] * val,
        }
    )
    images = np.random.default_rng(0).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)
    return Dataset(table, images)


def prepare_ours(size: str, data: Dataset, family: str, folder: Path) -> loop.Task:
    """Return a system's training as its stage makes it, with the study's settings, of one epoch."""
    settings = PARAMS.section(SYSTEMS[family], TrainingSettings)
    changes = {"weights": "random", "warmup_steps": 0, "epochs": 1, "save_every": 10**9}
    changes |= {"checkpoint": str(folder), "batch_size": SIZES[size].batch}
    accelerator, source = start(0), find_checkpoint(str(folder), "main")
    setup = Setup(
        system=family,
        key=SYSTEMS[family],
        params=PARAMS,
        settings=settings.model_copy(update=changes),
        accelerator=accelerator,
        source=source,
        data=data,
        images=place_images(data.images, accelerator.device),
        accepted=np.ones(len(data.table), bool),
    )
    return make_task(setup, *load_classification(setup))


def prepare_language(size: str, data: Dataset) -> loop.Task:
    """Return finetune_qwen's training as its stage makes it, of one epoch."""
    key, batch, accelerator = "study.finetune_qwen", SIZES[size].batch, start(0)
    changes = {"warmup_steps": 0, "epochs": 1, "save_every": 10**9, "batch_size": batch}
    settings = PARAMS.section(key, VlmTrainingSettings).model_copy(update=changes)
    vlm = make_reader(size, accelerator)
    with mock.patch.object(vlm_training, "load_vlm", return_value=vlm):
        reader, adapted = load_reader(accelerator, vlm.source, PROMPTS, settings, 0)
    images = place_images(data.images, accelerator.device)
    accepted = np.ones(len(data.table), bool)
    shared = (settings, accelerator, vlm.source, data, images, accepted)
    setup = Setup("finetune_qwen", key, PARAMS, *shared)
    shared = (settings, data, accelerator, images, vlm.normalization)
    return make_task(setup, reader, AnswerObjective(*shared, reader, adapted))


def train_ours(task: loop.Task) -> None:
    loop.train(task, 0, NoStates(), lambda row: None)


def measure_training(size: str) -> list[Row]:
    """Time trainings of SigLIP with their validation, without loading, against the Trainer's."""
    sizes = SIZES[size]
    data = make_data(sizes.train, sizes.val)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "siglip")
        write_encoder(folder, "siglip", size)
        paths = write_pictures(data, sizes, Path(place))
        task = prepare_ours(size, data, "siglip", folder)
        memory = peak_memory(partial(train_ours, task))  # warms up, too
        for _ in range(sizes.repeats):
            task = prepare_ours(size, data, "siglip", folder)
            ours.append(seconds(partial(train_ours, task)) / sizes.train)
            trainer = prepare_theirs(size, data, folder, paths, place)
            theirs.append(seconds(trainer.train) / sizes.train)
    name = f"Training, SigLIP {size}, batch {sizes.batch}"
    opponent = f"Hugging Face Trainer, {workers()} processes read PNG files of {sizes.side} px"
    return [Row(name, opponent, sizes.train, "images", ours, theirs, memory)]


def measure_systems(size: str) -> Iterator[dict]:
    """Train each system at its size: rate, peak memory, and whether runs end in the same bits.

    Yields for each its name, seconds an image of each run, memory, and the largest difference of a
    weight between runs.
    """
    sizes = SIZES[size]
    data = make_data(sizes.train, sizes.val)
    for family in SYSTEMS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, family)
            write_encoder(folder, family, size)
            prepare = partial(prepare_ours, size, data, family, folder)
            yield repeat_training(f"{family} {size}", prepare, sizes.repeats)
    data = make_data(sizes.asked, sizes.asked // 4)
    prepare = partial(prepare_language, size, data)
    yield repeat_training(f"qwen {size}, adapters", prepare, sizes.repeats)


def repeat_training(name: str, prepare: Callable[[], loop.Task], repeats: int) -> dict:
    """Train what `prepare` returns again and again: a line of `measure_systems`."""
    memory = peak_memory(lambda: train_ours(prepare()))  # warms up, too
    times, ended = [], []
    for _ in range(repeats):
        task = prepare()
        times.append(seconds(partial(train_ours, task)) / len(task.rows))
        weights = [x.detach().flatten() for x in task.model.parameters() if x.requires_grad]
        ended.append(torch.cat(weights).cpu())
    apart = max((ended[0] - other).abs().max().item() for other in ended)
    line = {"name": name, "n": len(task.rows), "seconds": times, "memory": memory}
    return line | {"largest_difference_of_a_weight": apart}


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


def prepare_theirs(
    size: str, data: Dataset, checkpoint: Path, paths: list[Path], folder: str
) -> Trainer:
    """Return a training of the same model, batch, precision and schedule; a loader per core."""
    sizes, targets, cuda = SIZES[size], data.targets(), torch.cuda.is_available()
    train, val = (
        Pictures([paths[i] for i in data.rows(split)], targets[data.rows(split)])
        for split in ("train", "val")
    )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=sizes.batch,
        per_device_eval_batch_size=2 * sizes.batch,
        num_train_epochs=1,
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
    model = load_classifier(find_checkpoint(str(checkpoint), "main"), SIDE, random=True)
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=val)
    trainer.remove_callback(PrinterCallback)
    return trainer
