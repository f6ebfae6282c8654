"""Zero-shot: one forward pass for a batch and all answers, against `generate`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from architectures import SIDE, make_reader
from measure import Row, peak_memory, time_in_turn

from chest.core.params import load_params
from chest.models.common.batch_inference import in_batches
from chest.models.common.device import start
from chest.models.common.image_store import ImageStore, place_images
from chest.models.vlm.asking import AskedRows, Asker, VlmPrompts, VlmSettings, asked
from chest.models.vlm.generation import generate_answers

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)


@dataclass(frozen=True)
class Sizes:
    """How many images ours answers, batched generation, and generation of one at a time."""

    images: int
    generated: int
    alone: int
    batch: int
    repeats: int


SIZES = {
    "full": Sizes(512, 128, 4, 128, 5),
    "small": Sizes(48, 16, 4, 16, 5),
    "tiny": Sizes(6, 6, 2, 3, 1),
}


def measure_zeroshot(size: str) -> list[Row]:
    sizes, accelerator = SIZES[size], start(0)
    drawn = np.random.default_rng(0).integers(0, 256, (sizes.images, SIDE, SIDE), dtype=np.uint8)
    images = place_images(drawn, accelerator.device)
    return measure_qwen(size, accelerator, images)


def measure_qwen(size: str, accelerator: Accelerator, images: ImageStore) -> list[Row]:
    """Time the likelihood of the answers against `generate`, in batches and one by one."""
    sizes, reader = SIZES[size], make_reader(size, accelerator)
    settings = PARAMS.section("study.zeroshot_qwen", VlmSettings)
    asker = Asker(accelerator, reader, PROMPTS, settings, sizes.batch)

    def ours(count: int) -> None:
        about = AskedRows(images, np.arange(count), np.resize(["ct", "xray"], count))
        asker.ask(about, [asked(PROMPTS)])

    def theirs(count: int, batch: int) -> None:
        for rows in in_batches(np.arange(count), batch):
            question = PROMPTS.ask("ct", PROMPTS.question)
            generate_answers(reader, images.take(rows), question, settings.max_new_tokens)

    ours(sizes.batch)
    theirs(sizes.batch, sizes.batch)
    memory = peak_memory(lambda: ours(min(sizes.images, 4 * sizes.batch)))
    name = f"Likelihood of the answers, Qwen2.5-VL {size}, batches of {sizes.batch}"
    opponent, rows = f"generate, {settings.max_new_tokens} tokens", []
    for how, count, batch in (
        (f"batches of {sizes.batch}", sizes.generated, sizes.batch),
        ("one image at a time", sizes.alone, 1),
    ):
        times = time_in_turn(
            lambda: ours(sizes.images),
            lambda c=count, b=batch: theirs(c, b),
            sizes.repeats,
            sizes.images,
            count,
        )
        rows.append(Row(name, f"{opponent}, {how}", sizes.images, "images", *times, memory))
    return rows
