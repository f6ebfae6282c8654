"""Qwen2.5-VL (Bai et al. 2025) as a zero-shot classifier: one image, one question, three answers.

All images of a modality are asked about in the same words, and a batch holds one modality only: so
no row is padded, and no image can influence another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import model_validator
from transformers import (
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from chest.core.errors import ParameterError
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Positive, Section, Text
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.journal import Journal
from chest.models.common.pixels import Normalization, load_normalization, to_pixels
from chest.models.settings import ZeroshotSettings


class QwenSettings(ZeroshotSettings):
    """The block ``zeroshot_qwen`` of a profile in params.yaml."""

    method: Literal["likelihood", "generate"]
    max_new_tokens: Positive


class Modalities(Section):
    """What the question calls an image of each modality."""

    ct: Text
    xray: Text


class Answers(Section):
    """What the model would say for each class."""

    covid19: Text
    normal: Text
    tuberculosis: Text

    @model_validator(mode="after")
    def _distinct(self):
        texts = [getattr(self, label).casefold() for label in LABELS]
        if any(a in b for a, b in permutations(texts, 2)):
            raise ValueError("an answer is part of another one: free text could name both")
        return self


class QwenPrompts(Section):
    """``prompts.qwen`` in params.yaml."""

    question: Text
    modality: Modalities
    answers: Answers

    @model_validator(mode="after")
    def _names_modality(self):
        if re.findall(r"{.*?}|[{}]", self.question) != ["{modality}"]:
            raise ValueError("question: needs {modality} once, and no other braces")
        return self

    def ask(self, modality: str) -> str:
        """Return the question about an image of `modality`."""
        return self.question.format(modality=getattr(self.modality, modality))


@dataclass(frozen=True)
class Reader:
    """The model with what turns images of `side` px and questions into its inputs."""

    source: Source
    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: object
    chat_template: str
    normalization: Normalization
    side: int


def load_reader(accelerator: Accelerator, source: Source, side: int) -> Reader:
    """Load a checkpoint for inference on the device; the weights are bf16 under bf16 precision.

    Raises CheckpointError for another kind of checkpoint and ParameterError for a `side` that it
    cannot read, both before weights are fetched.
    """
    config = source.load_config(Qwen2_5_VLConfig)
    visual_tokens(config, side)
    tokenizer = source.load_tokenizer()
    template = _load_chat_template(source, tokenizer)
    bf16 = accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if bf16 else float_type(accelerator)
    model = source.load_model(Qwen2_5_VLForConditionalGeneration, config=config, dtype=dtype)
    # The checkpoint's own settings sample, and penalise words that the question names.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(accelerator.device).eval()
    return Reader(source, model, tokenizer, template, load_normalization(source), side)


def _load_chat_template(source: Source, tokenizer) -> str:
    """Load the processor's template, which knows images; the tokenizer's own may not.

    The processor itself is not made: its video part needs torchvision.
    """
    processor, _ = source.load(Qwen2_5_VLProcessor.get_processor_dict, "chat template")
    template = processor.get("chat_template") or tokenizer.chat_template
    if not isinstance(template, str):
        raise source.error("it has no chat template, or several")
    return template


def visual_tokens(config: Qwen2_5_VLConfig, side: int) -> int:
    """Return how many tokens an image of `side` px becomes: 64 for 224, 16 for 112.

    Raises ParameterError if `side` is no multiple of a token's side (28 px): the model would have
    to resize the image.
    """
    token_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if side % token_side:
        raise ParameterError(
            f"image_size: {side} px, but Qwen2.5-VL needs a multiple of {token_side}"
        )
    return (side // token_side) ** 2


def prompt_ids(reader: Reader, question: str) -> list[int]:
    """Return the token ids of one image and `question`, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    with reader.source.reading("chat template"):
        text = reader.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=reader.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = reader.model.config.image_token_id
    if ids.count(image) != 1:
        raise reader.source.error(f"its chat template has {ids.count(image)} places for one image")
    at = ids.index(image)
    return ids[:at] + [image] * visual_tokens(reader.model.config, reader.side) + ids[at + 1 :]


# --- Images ----------------------------------------------------------------------------------


def image_inputs(reader: Reader, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the vision tower's inputs for uint8 grey `images`, (B, side, side), on the device.

    ``pixel_values``: (B * patches, channels * 2 * 14 * 14), patches in the order of the 2 x 2
    blocks that become one token, as the family's own preprocessor gives them for an image that
    needs no resize. ``image_grid_thw``: (B, 3).
    """
    vision = reader.model.config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    # Not normalized in bf16, which has fewer steps than there are grey values.
    dtype = torch.promote_types(reader.model.dtype, torch.float32)
    pixels = to_pixels(images, reader.normalization, dtype=dtype)
    count, channels, side, _ = pixels.shape
    blocks = side // (patch * merge)
    cut = pixels.view(count, channels, blocks, merge, patch, blocks, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block row and column, place in it, pixels
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], frames, patch, patch)  # a still picture, twice
    return {
        "pixel_values": cut.reshape(-1, channels * frames * patch * patch),
        "image_grid_thw": _grid(reader).expand(count, -1),
    }


def _grid(reader: Reader) -> torch.Tensor:
    """Return frames, rows and columns of patches of an image, (1, 3)."""
    patches = reader.side // reader.model.config.vision_config.patch_size
    return torch.tensor([[1, patches, patches]], device=reader.model.device)


# --- The likelihood of answers ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its answers: all that is the same for every image, computed once.

    The answers stand side by side behind the prompt: each sees the prompt and itself only, and
    takes the positions that follow the prompt. ``before`` holds the keys and values, layer by
    layer, of what stands before the image; ``after`` the embedded tokens behind it, (tokens, d).
    ``positions``, (3, 1, L), and ``mask``, (1, 1, L, before + L), are of the image's tokens and
    those after it. At ``places`` of these L the model predicts ``answer_tokens``, one token each;
    every answer has as many of them as ``lengths`` says, the end of turn included.
    """

    before: list[tuple[torch.Tensor, torch.Tensor]]
    after: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    answer_tokens: torch.Tensor
    lengths: list[int]


@torch.inference_mode()
def prepare_question(reader: Reader, text: str, answers: Sequence[str]) -> Question:
    """Tokenize the question `text` with its `answers` and compute what no image changes."""
    model, device = reader.model, reader.model.device
    prompt = prompt_ids(reader, text)
    branches = [reader.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    start = prompt.index(model.config.image_token_id)
    end = start + prompt.count(model.config.image_token_id)
    embedded = model.get_input_embeddings()(
        torch.tensor([*prompt, *chain(*branches)], device=device)
    )
    positions = _positions(reader, prompt, branches)
    cache = model.model.language_model(
        inputs_embeds=embedded[None, :start], position_ids=positions[..., :start], use_cache=True
    ).past_key_values
    places, answer_tokens, place = [], [], len(prompt) - start
    for branch in branches:
        # The prompt's last token predicts an answer's first; its last predicts the end of turn.
        places += [len(prompt) - start - 1, *range(place, place + len(branch))]
        answer_tokens += [*branch, reader.tokenizer.eos_token_id]
        place += len(branch)
    return Question(
        before=[(layer.keys, layer.values) for layer in cache.layers],
        after=embedded[end:],
        positions=positions[..., start:],
        mask=_mask(len(prompt), branches).to(device)[..., start:, :],
        places=torch.tensor(places, device=device),
        answer_tokens=torch.tensor(answer_tokens, device=device),
        lengths=[len(branch) + 1 for branch in branches],
    )


@torch.inference_mode()
def answer_likelihoods(reader: Reader, images: torch.Tensor, question: Question) -> torch.Tensor:
    """Return the log-likelihood of each answer for each of uint8 grey `images`: (B, answers).

    An answer scores the sum of the log-probabilities of its tokens, each given the image, the
    question and the tokens before it, and of the end-of-turn token: the probability that the model
    says just this answer and stops. There is no division by length: the answers are exclusive
    events, and their probabilities compare. One forward pass.
    """
    count = len(images)
    cache = DynamicCache(
        [tuple(x.expand(count, -1, -1, -1) for x in layer) for layer in question.before]
    )
    vision = reader.model.get_image_features(**image_inputs(reader, images)).pooler_output
    after = question.after.expand(count, -1, -1)
    hidden = reader.model.model.language_model(
        inputs_embeds=torch.cat([torch.stack(vision), after], dim=1),
        attention_mask=question.mask.expand(count, -1, -1, -1),
        position_ids=question.positions.expand(-1, count, -1),
        past_key_values=cache,
    ).last_hidden_state[:, question.places]
    logits = reader.model.lm_head(hidden)
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logs = logs.gather(2, question.answer_tokens.expand(count, -1)[..., None])[..., 0]
    return torch.stack([answer.sum(1) for answer in logs.split(question.lengths, 1)], 1)


def _positions(reader: Reader, prompt: list[int], branches: list[list[int]]) -> torch.Tensor:
    """Return time, height and width of each token of prompt and answers, (3, 1, L)."""
    ids = torch.tensor([prompt], device=reader.model.device)
    is_image = (ids == reader.model.config.image_token_id).int()
    own, _ = reader.model.model.get_rope_index(ids, is_image, image_grid_thw=_grid(reader))
    steps = torch.cat([torch.arange(len(branch)) for branch in branches]).to(own.device)
    return torch.cat([own, (own.amax() + 1 + steps).expand(3, 1, -1)], dim=2)


def _mask(start: int, branches: list[list[int]]) -> torch.Tensor:
    """Return which tokens each token sees, bool (1, 1, L, L)."""
    lengths = torch.tensor([start, *map(len, branches)])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # 0 is the prompt
    seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
    return (seen & torch.ones_like(seen).tril())[None, None]


# --- Free text -------------------------------------------------------------------------------


@torch.inference_mode()
def generate_answers(
    reader: Reader, images: torch.Tensor, question: str, max_new_tokens: int
) -> list[str]:
    """Return what the model says to each of uint8 grey `images`, by greedy decoding."""
    ids = torch.tensor([prompt_ids(reader, question)], device=reader.model.device)
    ids = ids.expand(len(images), -1)
    output = reader.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == reader.model.config.image_token_id).int(),
        max_new_tokens=max_new_tokens,
        **image_inputs(reader, images),
    )
    texts = reader.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def parse_answer(text: str, answers: Mapping[str, str]) -> str | None:
    """Return the one class whose answer `text` names; None if it names none, or several.

    `answers` maps each class to its answer. Neither case counts nor what stands between its words
    and numbers (COVID-19, covid 19); inside a longer word (abnormal) an answer is not named.
    """
    named = [label for label in LABELS if _names(text, answers[label])]
    return named[0] if len(named) == 1 else None


def _names(text: str, answer: str) -> bool:
    parts = re.findall(r"[^\W\d_]+|\d+", answer)
    pattern = r"(?<![^\W_])" + r"[\W_]*".join(map(re.escape, parts)) + r"(?![^\W_])"
    return re.search(pattern, text, re.IGNORECASE) is not None


# --- Many images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class AskedRows:
    """Images to ask about: `rows`, int64 (n,), of `images`, with the modality of each, (n,)."""

    images: ImageStore
    rows: np.ndarray
    modalities: Sequence[str]


def ask_rows(
    accelerator: Accelerator,
    reader: Reader,
    asked: AskedRows,
    prompts: QwenPrompts,
    settings: QwenSettings,
    journal: Journal | None = None,
) -> list[list[float] | None]:
    """Return the probabilities of the classes for each row; None if the answer names no class."""
    wordings = prompts.answers.model_dump()
    texts = {modality: prompts.ask(modality) for modality in MODALITIES}
    modality_of = dict(zip(asked.rows.tolist(), asked.modalities, strict=True))
    if settings.method == "likelihood":
        answers = [wordings[label] for label in LABELS]
        questions = {m: prepare_question(reader, text, answers) for m, text in texts.items()}

    def by_likelihood(rows: np.ndarray) -> torch.Tensor:
        question = questions[modality_of[rows[0]]]
        return answer_likelihoods(reader, asked.images.take(rows), question).softmax(1)

    def by_text(rows: np.ndarray) -> list[list[float] | None]:
        images, question = asked.images.take(rows), texts[modality_of[rows[0]]]
        said = generate_answers(reader, images, question, settings.max_new_tokens)
        return [_one_hot(parse_answer(text, wordings)) for text in said]

    kinds = np.asarray(asked.modalities)
    groups = [asked.rows[kinds == modality] for modality in MODALITIES]
    batches = [batch for rows in groups for batch in in_batches(rows, settings.batch_size)]
    function = by_likelihood if settings.method == "likelihood" else by_text
    found = infer(accelerator, batches, function, journal)
    return [found[row] for row in asked.rows.tolist()]


def _one_hot(label: str | None) -> list[float] | None:
    return label and [float(label == name) for name in LABELS]
