"""Zero-shot: one prefill a batch against generation, and its parts against what is usual."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from architectures import HALF, SIDE, make_reader, make_siglip
from measure import Row, peak_memory, time_in_turn
from transformers import SiglipModel

from chest.answering import in_batches
from chest.compute import start, to_pixels
from chest.labels import LABELS
from chest.params import load_params
from chest.qwen import (
    Asked,
    Question,
    Reader,
    answer_likelihoods,
    ask_rows,
    generate_answers,
    image_inputs,
    pose,
    prompt_ids,
)
from chest.resident import Images, place_images
from chest.siglip import TEXT_LENGTH, Input, compare_rows

PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")


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
    return [
        *measure_qwen(size, accelerator, images),
        measure_siglip(size, accelerator, images),
    ]


# --- Qwen2.5-VL ------------------------------------------------------------------------------


def measure_qwen(size: str, accelerator: Accelerator, images: Images) -> list[Row]:
    sizes, reader = SIZES[size], make_reader(size, accelerator)
    name = f"Likelihood of the answers, Qwen2.5-VL {size}, batches of {sizes.batch}"
    tokens = PARAMS.study.zeroshot_qwen.max_new_tokens

    def ours(count: int) -> None:
        ask(accelerator, reader, images, count, sizes.batch)

    def theirs(count: int, batch: int) -> None:
        for rows in in_batches(np.arange(count), batch):
            generate_answers(reader, images.take(rows), text(), tokens)

    ours(sizes.batch)
    theirs(sizes.batch, sizes.batch)
    memory = peak_memory(lambda: ours(min(sizes.images, 4 * sizes.batch)))
    rows = []
    for opponent, count, batch in (
        (f"generate, {tokens} tokens, batches of {sizes.batch}", sizes.generated, sizes.batch),
        (f"generate, {tokens} tokens, one image at a time", sizes.alone, 1),
    ):
        times = time_in_turn(
            lambda: ours(sizes.images), lambda c=count, b=batch: theirs(c, b),
            sizes.repeats, sizes.images, count,
        )  # fmt: skip
        rows.append(Row(name, opponent, sizes.images, "images", *times, memory))
    return [*rows, *measure_parts(size, accelerator, reader, images)]


def measure_parts(size: str, accelerator: Accelerator, reader: Reader, images: Images) -> list[Row]:
    """What each saving brings: ours with it against ours without."""
    sizes, count = SIZES[size], min(SIZES[size].images, 4 * SIZES[size].batch)
    plain = replace(reader, model=_without_patches(reader))
    question = pose(reader, text(), wordings())

    def score(one: Reader, asked: Question) -> None:
        for rows in in_batches(np.arange(count), sizes.batch):
            answer_likelihoods(one, images.take(rows), asked)

    def whole(one: Reader) -> None:
        """The answers one after the other, each with prompt and image, as a first version would."""
        for rows in in_batches(np.arange(count), sizes.batch):
            for wording in wordings():
                score_alone(one, images.take(rows), wording)

    rows = []
    for name, theirs in (
        ("windows of all images in one attention call", lambda: score(plain, question)),
        ("three answers in one pass, text before the image once", lambda: whole(reader)),
    ):
        score(reader, question)
        times = time_in_turn(lambda: score(reader, question), theirs, max(3, sizes.repeats), count)
        rows.append(Row(f"Qwen2.5-VL {size}: {name}", "ours without", count, "images", *times))
    return rows


@torch.inference_mode()
def score_alone(reader: Reader, images: torch.Tensor, wording: str) -> None:
    """A forward pass of prompt, image and one answer; logits where the answer is said."""
    said = reader.tokenizer(wording, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt_ids(reader, text()), *said]], device=reader.model.device)
    ids = ids.expand(len(images), -1)
    reader.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(said) + 1,
        mm_token_type_ids=(ids == reader.model.config.image_token_id).int(),
        **image_inputs(reader, images),
    ).logits.float().log_softmax(-1)  # fmt: skip


def _without_patches(reader: Reader):
    """The same weights, with transformers' own attention in the vision tower."""
    memo = {id(x): x for x in (*reader.model.parameters(), *reader.model.buffers())}
    model = copy.deepcopy(reader.model, memo)
    for block in model.model.visual.blocks:
        block.attn.__dict__.pop("forward", None)
    return model


def ask(accelerator: Accelerator, reader: Reader, images: Images, count: int, batch: int) -> None:
    settings = PARAMS.study.zeroshot_qwen.model_copy(update={"batch_size": batch})
    kinds = np.resize(["ct", "xray"], count)
    asked = Asked(images, np.arange(count), kinds, PARAMS.prompts.qwen, settings)
    ask_rows(accelerator, reader, asked)


def text() -> str:
    prompts = PARAMS.prompts.qwen
    return prompts.question.format(modality=prompts.modality.ct)


def wordings() -> list[str]:
    return [getattr(PARAMS.prompts.qwen.answers, label) for label in LABELS]


# --- SigLIP ----------------------------------------------------------------------------------


def measure_siglip(size: str, accelerator: Accelerator, images: Images) -> Row:
    """Ours against the model as its documentation calls it: texts with every batch."""
    sizes = SIZES[size]
    model = make_siglip(size).to(accelerator.device)
    batch = PARAMS.study.zeroshot_siglip.batch_size
    ids = torch.randint(2, 1000, (3 * len(LABELS), TEXT_LENGTH), device=accelerator.device)
    classes = torch.nn.functional.normalize(torch.randn(3, model.config.vision_config.hidden_size))
    asked = Input(images, np.arange(sizes.images), HALF)

    def ours() -> None:
        compare_rows(accelerator, model, classes.to(accelerator.device), asked, batch)

    times = time_in_turn(
        ours, lambda: as_documented(accelerator, model, images, ids, sizes.images, batch),
        max(3, sizes.repeats), sizes.images,
    )  # fmt: skip
    name, opponent = f"Zero-shot SigLIP {size}", "SigLIP called with its texts for every batch"
    return Row(name, opponent, sizes.images, "images", *times)


@torch.inference_mode()
def as_documented(
    accelerator: Accelerator, model: SiglipModel, images: Images, ids: torch.Tensor, count: int,
    batch: int,
) -> None:  # fmt: skip
    for rows in in_batches(np.arange(count), batch):
        pixels = to_pixels(images.take(rows), HALF)
        with accelerator.autocast():
            model(input_ids=ids, pixel_values=pixels).logits_per_image.tolist()
