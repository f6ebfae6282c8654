"""Make images of some classes from the training images, for the systems that ask for them.

Reads   data/manifest.csv, data/split.csv, and the smallest side of data/images/ that is large
        enough; of the images those of the training split, and for the loss that is shown of it
        the validation split
Writes  data/synthetic/<side>.npy       for `image_size` and each packed side, uint8 (n, side, side)
        data/synthetic/manifest.csv     label, modality, method, seed and guidance of each
        models/synthesize/              the U-Net, for diffusers, and its training curve
        .resume/synthesize/             training states and finished images, to resume

`diffusion` samples a diffusion model that is trained on all training images of the modality. The
other methods are what it has to beat at the same number of images: `duplicates` of training images,
duplicates that are `augmented`, and the `mixup` of two images of the class.

    python stages/synthesize.py                 (or: dvc repro synthesize)
    accelerate launch stages/synthesize.py      on several GPUs
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from pydantic import Field

from chest.core.errors import ParameterError
from chest.core.files import remove, replacing, write_table
from chest.core.labels import LABELS
from chest.core.params import Count, Fraction, Params, Positive, load_params
from chest.core.runtime import interrupt_note, run_stage
from chest.data.dataset import Dataset, packed_sides, read_dataset
from chest.data.synthetic import SYNTHETIC_COLUMNS, resize_images, write_synthetic
from chest.models.array_text import from_text, to_text
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.device import Precision, start
from chest.models.common.fingerprint import RESUME_FOLDER, Fingerprint, fingerprint
from chest.models.common.image_store import place_images
from chest.models.common.journal import open_journal
from chest.models.diffusion import (
    Channels,
    DiffusionConfig,
    Generator,
    make_generator,
    save_generator,
)
from chest.training.augmentation import change, draw_changes
from chest.training.checkpointing import States
from chest.training.diffusion import Denoising
from chest.training.loop import Task, train
from chest.training.settings import Augment, LoopSettings

STAGE = "synthesize"
MODEL = Path("models") / STAGE
RANDOM = Source("random weights", "", commit="none")


class SynthesisSettings(LoopSettings):
    """Settings of synthesize; ``params.yaml`` documents each."""

    method: Literal["diffusion", "duplicates", "augmented", "mixup"]
    modality: Literal["ct", "xray"]
    classes: list[Literal[LABELS]]
    per_class: Count
    strong: Augment
    channels: list[Channels]
    blocks: Positive
    patch: Positive
    ema: Fraction
    guidance: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)]
    sampling_steps: Annotated[int, Field(ge=1, le=1000)]
    sampling_batch: Positive

    @property
    def unet(self) -> DiffusionConfig:
        """The U-Net to train."""
        names = ("image_size", "channels", "blocks", "patch")
        return DiffusionConfig(**{name: getattr(self, name) for name in names})


def main() -> None:
    params = load_params()
    settings = params.system(STAGE, SynthesisSettings)
    key, packed = f"{params.profile}.{STAGE}", packed_sides()
    data = read_dataset("train", "val", side=side_to_read(key, settings, packed))
    table = plan_images(data, settings, params.seed)
    accelerator = start(params.seed, params.system("precision", Precision))

    if settings.method == "diffusion" and len(table):
        images = diffuse(accelerator, params, settings, data, table)
    else:
        images = rearrange(settings, data, table)
        if accelerator.is_main_process:
            write_model(None, pd.DataFrame(columns=["epoch"]))
    if accelerator.is_main_process:
        write_synthetic(table, images, {settings.image_size, *packed})
        remove(RESUME_FOLDER / STAGE)
    accelerator.end_training()


def side_to_read(key: str, settings: SynthesisSettings, packed: list[int]) -> int | None:
    """Return the smallest packed side that images can be shrunk from."""
    side, multiple = settings.image_size, settings.unet.multiple
    if side % multiple:
        raise ParameterError(
            f"{key}.image_size: {side} is no multiple of {multiple}, which the"
            " channels and the patch need"
        )
    if packed and side > packed[-1]:
        raise ParameterError(f"{key}.image_size: {side}, but images are packed to {packed[-1]} px")
    return min((x for x in packed if x >= side), default=None)


def plan_images(data: Dataset, settings: SynthesisSettings, seed: int) -> pd.DataFrame:
    """Return the table of what is to be made; a class without training images gets none.

    Each image has a seed of its own.
    """
    found = {data.table["label"][row] for row in training_rows(data, settings)}
    labels = [label for label in settings.classes if label in found]
    table = pd.DataFrame({"label": np.repeat(labels, settings.per_class)})
    guidance = settings.guidance if settings.method == "diffusion" else ""
    table = table.assign(
        synthetic_id=[f"synthetic_{i:06}" for i in range(len(table))],
        modality=settings.modality,
        method=settings.method,
        seed=seed + np.arange(len(table)),
        guidance=guidance,
    )
    return table[list(SYNTHETIC_COLUMNS)]


def training_rows(data: Dataset, settings: SynthesisSettings, *splits: str) -> np.ndarray:
    """Return the rows of the modality in the training split, or in `splits`, int64 (n,)."""
    rows = data.rows(*(splits or ("train",)))
    return rows[data.table["modality"].to_numpy()[rows] == settings.modality]


# --- From the pixels of training images ------------------------------------------------------


def rearrange(settings: SynthesisSettings, data: Dataset, table: pd.DataFrame) -> np.ndarray:
    """Return the images of `table` made by `settings.method` other than diffusion."""
    rows, side = training_rows(data, settings), settings.image_size
    images, labels = [], data.table["label"].to_numpy()[rows]
    for label, own in table.groupby("label", sort=False):
        real = resize_images(data.images[rows[labels == label]], side)
        for place, seed in enumerate(own["seed"]):
            rng = np.random.default_rng(seed)
            images.append(make_image(settings, real, place, rng))
    return np.array(images, np.uint8).reshape(-1, side, side)


def make_image(
    settings: SynthesisSettings, real: np.ndarray, place: int, rng: np.random.Generator
) -> np.ndarray:
    """Return an image of the class of `real`, uint8 (n, side, side); they take turns by `place`."""
    first = real[place % len(real)]
    if settings.method == "augmented":
        grey = torch.from_numpy(first[None, None] / 255.0)
        changed = change(grey, draw_changes(settings.strong, (1,), rng))[0, 0].numpy()
        return np.round(255 * changed).astype(np.uint8)
    if settings.method == "mixup":
        second = real[rng.integers(len(real))]
        share = rng.uniform()
        return np.round(share * first + (1 - share) * second).astype(np.uint8)
    return first


# --- By a diffusion model --------------------------------------------------------------------


def diffuse(
    accelerator: Accelerator,
    params: Params,
    settings: SynthesisSettings,
    data: Dataset,
    table: pd.DataFrame,
) -> np.ndarray:
    """Train the diffusion model, write it, and return the images of `table` that it samples."""
    from diffusers.training_utils import EMAModel

    identity = identify(accelerator, params, settings, data)
    states = States(STAGE, identity)
    journal = open_journal(accelerator, f"{STAGE}/images", identity)

    # 1. Learn the training images, of all classes.
    rows = [training_rows(data, settings, split) for split in ("train", "val")]
    trained = np.arange(len(rows[0]))
    rows = np.concatenate(rows)
    pixels = resize_images(data.images[rows], settings.image_size)
    images = place_images(pixels, accelerator.device)
    generator = make_generator(accelerator, settings.unet)
    objective = Denoising(
        generator,
        images,
        targets=data.targets()[rows],
        validation=np.arange(len(trained), len(rows)),
        seed=params.seed,
        batch_size=2 * settings.batch_size,  # no gradients are kept
    )
    task = Task(
        key=f"{params.profile}.{STAGE}",
        settings=settings,
        accelerator=accelerator,
        model=generator.unet,
        images=images,
        rows=trained,
        weights=None,
        objective=objective,
        average=EMAModel(generator.unet.parameters(), decay=settings.ema),
    )
    curve, _ = train(task, params.seed, states, lambda row: accelerator.print(describe(row)))

    # 2. Sample.
    with interrupt_note("The training and finished images are saved: the next run resumes."):
        generator.unet.eval()
        batches = in_batches(np.arange(len(table)), settings.sampling_batch)
        found = infer(accelerator, batches, by_sampling(generator, settings, table), journal)
        if accelerator.is_main_process:
            write_model(generator, curve)
    shape = (settings.image_size, settings.image_size)
    return np.stack([from_text(found[i], shape) for i in range(len(table))])


def identify(
    accelerator: Accelerator, params: Params, settings: SynthesisSettings, data: Dataset
) -> Fingerprint:
    """Return the digests of all that the images depend on."""
    chosen = settings.model_dump(exclude={"save_every", "micro_batch", "sampling_batch"})
    parameters = {"seed": params.seed, **chosen}
    return fingerprint(accelerator, RANDOM, data.images.shape[-1], parameters)


def describe(row: dict) -> str:
    """Return what is printed of an epoch."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def by_sampling(
    generator: Generator, settings: SynthesisSettings, table: pd.DataFrame
) -> Callable[[np.ndarray], list[str]]:
    """Return a function that samples rows of `table`."""
    classes = table["label"].map(LABELS.index)

    def sample(rows: np.ndarray) -> list[str]:
        own = table["seed"].iloc[rows].tolist(), classes.iloc[rows].tolist()
        images = generator.sample(*own, settings.guidance, settings.sampling_steps)
        return [to_text(image) for image in images]

    return sample


def write_model(generator: Generator | None, curve: pd.DataFrame) -> None:
    """Write models/synthesize/."""
    with replacing(MODEL) as folder:
        folder.mkdir()
        if generator:
            save_generator(generator, folder)
        write_table(folder / "training.csv", curve, float_format="%.6g")


if __name__ == "__main__":
    run_stage(main)
