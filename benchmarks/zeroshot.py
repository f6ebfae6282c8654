"""Zero-shot: one forward pass per batch against generation, and against the documented call."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from architectures import HALF, SIDE, make_reader, make_siglip
from measure import Row, peak_memory, time_in_turn

from chest.core.labels import LABELS
from chest.core.params import load_params
from chest.models.common.batch_inference import in_batches
from chest.models.common.device import start
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.pixels import to_pixels
from chest.models.qwen import AskedRows, QwenPrompts, QwenSettings, ask_rows, generate_answers
from chest.models.siglip import TEXT_LENGTH, PromptClassifier, compare_rows

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")
PROMPTS = PARAMS.section("prompts.qwen", QwenPrompts)


@dataclass(frozen=True)
class Sizes:
    """How many images ours answers, batched generation, and generation of one at a time."""

    images: int
    generated: int
    alone: int
    batch: int
    repeats: int


SIZES = {
    "full": Sizes(16_300, 1_024, 32, 128, 1),
    "small": Sizes(48, 16, 4, 16, 3),
    "tiny": Sizes(6, 6, 2, 3, 1),
}


def measure_zeroshot(size: str) -> list[Row]:
    sizes, accelerator = SIZES[size], start(0)
    drawn = np.random.default_rng(0).integers(0, 256, (sizes.images, SIDE, SIDE), dtype=np.uint8)
    images = place_images(drawn, accelerator.device)
    return [*measure_qwen(size, accelerator, images), measure_siglip(size, accelerator, images)]


def measure_qwen(size: str, accelerator: Accelerator, images: ImageStore) -> list[Row]:
    """Time the likelihood of the answers against `generate`, in batches and one by one."""
    sizes, reader = SIZES[size], make_reader(size, accelerator)
    settings = PARAMS.section("study.zeroshot_qwen", QwenSettings)
    settings = settings.model_copy(update={"batch_size": sizes.batch})

    def ours(count: int) -> None:
        asked = AskedRows(images, np.arange(count), np.resize(["ct", "xray"], count))
        ask_rows(accelerator, reader, asked, PROMPTS, settings)

    def theirs(count: int, batch: int) -> None:
        for rows in in_batches(np.arange(count), batch):
            question = PROMPTS.ask("ct")
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


def measure_siglip(size: str, accelerator: Accelerator, images: ImageStore) -> Row:
    """Time ours against the model as its documentation calls it: texts with every batch."""
    sizes, batch = SIZES[size], 256
    model = make_siglip(size).to(accelerator.device)
    ids = torch.randint(2, 1000, (3 * len(LABELS), TEXT_LENGTH), device=accelerator.device)
    classes = torch.nn.functional.normalize(torch.randn(3, model.config.vision_config.hidden_size))
    classifier = PromptClassifier(model, classes.to(accelerator.device), HALF)
    rows = np.arange(sizes.images)

    @torch.inference_mode()
    def documented() -> None:
        for part in in_batches(rows, batch):
            pixels = to_pixels(images.take(part), HALF)
            with accelerator.autocast():
                model(input_ids=ids, pixel_values=pixels).logits_per_image.tolist()

    times = time_in_turn(
        lambda: compare_rows(accelerator, classifier, images, rows, batch),
        documented,
        max(3, sizes.repeats),
        sizes.images,
    )
    name, opponent = f"Zero-shot SigLIP {size}", "SigLIP called with its texts for every batch"
    return Row(name, opponent, sizes.images, "images", *times)
