"""Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923) as a zero-shot classifier.

The question is the same for all images of a modality, and a batch holds one modality only, so that
no row is padded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
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
    """How the question describes an image of each modality."""

    ct: Text
    xray: Text


class Answers(Section):
    """The model's answer for each class."""

    covid19: Text
    normal: Text
    tuberculosis: Text

    @model_validator(mode="after")
    def _distinct(self):
        texts = [getattr(self, label).casefold() for label in LABELS]
        if any(a in b for a, b in permutations(texts, 2)):
            raise ValueError("an answer is part of another one, so free text would name both")
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
class QwenModel:
    """Qwen2.5-VL with its tokenizer and what else prepares images of `side` px and questions."""

    source: Source
    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: object
    chat_template: str
    normalization: Normalization
    side: int


def load_qwen(accelerator: Accelerator, source: Source, side: int) -> QwenModel:
    """Load a checkpoint for inference on the device; with bf16 precision its weights are bf16.

    Raises CheckpointError for another kind of checkpoint and ParameterError for an impossible
    `side`, both before weights are fetched.
    """
    config = source.load_config(Qwen2_5_VLConfig)
    visual_tokens(config, side)
    tokenizer = source.load_tokenizer()
    template = _load_chat_template(source, tokenizer)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else float_type(accelerator)
    model = source.load_model(Qwen2_5_VLForConditionalGeneration, config=config, dtype=dtype)
    # The checkpoint's own settings sample, and penalize words that the question contains.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(accelerator.device).eval()
    return QwenModel(source, model, tokenizer, template, load_normalization(source), side)


def _load_chat_template(source: Source, tokenizer) -> str:
    """Load the processor's template; the tokenizer's own may have no place for images.

    The processor itself is not loaded, since its video part needs torchvision.
    """
    processor = source.load_dict(Qwen2_5_VLProcessor.get_processor_dict, "chat template")
    template = processor.get("chat_template") or tokenizer.chat_template
    if not isinstance(template, str):
        raise source.error("it has no chat template, or several")
    return template


def visual_tokens(config: Qwen2_5_VLConfig, side: int) -> int:
    """Return how many tokens an image of `side` px becomes: 64 for 224, 16 for 112.

    Raises ParameterError if `side` is not a multiple of a token's side, 28 px.
    """
    token_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if side % token_side:
        raise ParameterError(
            f"image_size: {side} px, but Qwen2.5-VL needs a multiple of {token_side}"
        )
    return (side // token_side) ** 2


def prompt_ids(qwen: QwenModel, question: str) -> list[int]:
    """Return the token ids of the prompt: one image, `question`, and the start of the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    with qwen.source.reading("chat template"):
        text = qwen.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=qwen.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    ids = qwen.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = qwen.model.config.image_token_id
    if ids.count(image) != 1:
        raise qwen.source.error(f"its chat template has {ids.count(image)} places for one image")
    at = ids.index(image)
    return ids[:at] + [image] * visual_tokens(qwen.model.config, qwen.side) + ids[at + 1 :]


# --- Images ----------------------------------------------------------------------------------


def image_inputs(qwen: QwenModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the vision tower's inputs for uint8 grey `images`, (B, side, side), on the device.

    ``pixel_values``: (B * patches, channels * 2 * 14 * 14), in blocks of the 2 x 2 patches that
    become one token, as Qwen's own preprocessor orders them. ``image_grid_thw``: (B, 3).
    """
    vision = qwen.model.config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    # Not normalized in bf16, which cannot tell all 256 grey values apart.
    dtype = torch.promote_types(qwen.model.dtype, torch.float32)
    pixels = to_pixels(images, qwen.normalization, dtype=dtype)
    count, channels, side, _ = pixels.shape
    blocks = side // (patch * merge)
    cut = pixels.view(count, channels, blocks, merge, patch, blocks, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block, patch in the block, channel, pixels
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], frames, patch, patch)  # a video of two frames
    return {
        "pixel_values": cut.reshape(-1, channels * frames * patch * patch),
        "image_grid_thw": _grid(qwen).expand(count, -1),
    }


def _grid(qwen: QwenModel) -> torch.Tensor:
    """Return an image's number of frames and of patches down and across, (1, 3)."""
    patches = qwen.side // qwen.model.config.vision_config.patch_size
    return torch.tensor([[1, patches, patches]], device=qwen.model.device)


# --- The likelihood of answers ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its answers: what is the same for every image, computed once.

    All answers follow the prompt in one sequence, but each attends to the prompt and itself only,
    at the positions right after the prompt. ``before``: keys and values of the tokens before the
    image, by layer. ``after``: embeddings of the tokens after it, (tokens, d). ``positions``,
    (3, 1, L), and ``mask``, (1, 1, L, before + L), cover the image and what follows. At ``places``
    among these L the model predicts ``answer_tokens``; each answer has ``lengths`` of them, the
    end of turn included.
    """

    before: list[tuple[torch.Tensor, torch.Tensor]]
    after: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    answer_tokens: torch.Tensor
    lengths: list[int]


@torch.inference_mode()
def prepare_question(qwen: QwenModel, text: str, answers: Sequence[str]) -> Question:
    """Tokenize the question `text` and its `answers`, and compute what no image changes."""
    model, device = qwen.model, qwen.model.device
    prompt = prompt_ids(qwen, text)
    branches = [qwen.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    start = prompt.index(model.config.image_token_id)
    end = start + prompt.count(model.config.image_token_id)
    embedded = model.get_input_embeddings()(
        torch.tensor([*prompt, *chain(*branches)], device=device)
    )
    positions = _positions(qwen, prompt, branches)
    cache = model.model.language_model(
        inputs_embeds=embedded[None, :start], position_ids=positions[..., :start], use_cache=True
    ).past_key_values
    places, answer_tokens, place = [], [], len(prompt) - start
    for branch in branches:
        # The prompt's last token predicts the answer's first, the answer's last the end of turn.
        places += [len(prompt) - start - 1, *range(place, place + len(branch))]
        answer_tokens += [*branch, qwen.tokenizer.eos_token_id]
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
def answer_likelihoods(qwen: QwenModel, images: torch.Tensor, question: Question) -> torch.Tensor:
    """Return the log-likelihood of each answer for uint8 grey `images`, (B, answers).

    It is the log-probability that the model says just this answer and stops: the sum over the
    answer's tokens and the end of turn. It is not divided by the length, since answers are
    exclusive events. One forward pass.
    """
    count = len(images)
    cache = DynamicCache(
        [tuple(x.expand(count, -1, -1, -1) for x in layer) for layer in question.before]
    )
    vision = qwen.model.get_image_features(**image_inputs(qwen, images)).pooler_output
    after = question.after.expand(count, -1, -1)
    hidden = qwen.model.model.language_model(
        inputs_embeds=torch.cat([torch.stack(vision), after], dim=1),
        attention_mask=question.mask.expand(count, -1, -1, -1),
        position_ids=question.positions.expand(-1, count, -1),
        past_key_values=cache,
    ).last_hidden_state[:, question.places]
    logits = qwen.model.lm_head(hidden)
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logs = logs.gather(2, question.answer_tokens.expand(count, -1)[..., None])[..., 0]
    return torch.stack([answer.sum(1) for answer in logs.split(question.lengths, 1)], 1)


def _positions(qwen: QwenModel, prompt: list[int], branches: list[list[int]]) -> torch.Tensor:
    """Return each token's position in time, height and width, (3, 1, L)."""
    ids = torch.tensor([prompt], device=qwen.model.device)
    is_image = (ids == qwen.model.config.image_token_id).int()
    own, _ = qwen.model.model.get_rope_index(ids, is_image, image_grid_thw=_grid(qwen))
    steps = torch.cat([torch.arange(len(branch)) for branch in branches]).to(own.device)
    return torch.cat([own, (own.amax() + 1 + steps).expand(3, 1, -1)], dim=2)


def _mask(start: int, branches: list[list[int]]) -> torch.Tensor:
    """Return which tokens each token attends to, bool (1, 1, L, L)."""
    lengths = torch.tensor([start, *map(len, branches)])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # 0 is the prompt
    seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
    return (seen & torch.ones_like(seen).tril())[None, None]


# --- Free text -------------------------------------------------------------------------------


@torch.inference_mode()
def generate_answers(
    qwen: QwenModel, images: torch.Tensor, question: str, max_new_tokens: int
) -> list[str]:
    """Return the model's answer to `question` for uint8 grey `images`, by greedy decoding."""
    ids = torch.tensor([prompt_ids(qwen, question)], device=qwen.model.device)
    ids = ids.expand(len(images), -1)
    output = qwen.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == qwen.model.config.image_token_id).int(),
        max_new_tokens=max_new_tokens,
        **image_inputs(qwen, images),
    )
    texts = qwen.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def parse_answer(text: str, answers: Mapping[str, str]) -> str | None:
    """Return the class whose answer `text` names; None if it names none, or several.

    `answers` maps each class to its answer. Case and punctuation do not count (COVID-19, covid 19);
    an answer inside a longer word (abnormal) is not named.
    """
    named = [label for label, answer in answers.items() if _names(text, answer)]
    return named[0] if len(named) == 1 else None


def _names(text: str, answer: str) -> bool:
    parts = re.findall(r"[^\W\d_]+|\d+", answer)
    pattern = r"(?<![^\W_])" + r"[\W_]*".join(map(re.escape, parts)) + r"(?![^\W_])"
    return re.search(pattern, text, re.IGNORECASE) is not None


# --- Many images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class AskedRows:
    """Rows to classify, int64 (n,), of `images`, with the modality of each, (n,)."""

    images: ImageStore
    rows: np.ndarray
    modalities: Sequence[str]


def ask_rows(
    accelerator: Accelerator,
    qwen: QwenModel,
    asked: AskedRows,
    prompts: QwenPrompts,
    settings: QwenSettings,
    journal: Journal | None = None,
) -> list[list[float] | None]:
    """Return the class probabilities of each row; None if the answer names no class."""
    classify = {m: _classifier(qwen, prompts.ask(m), prompts, settings) for m in MODALITIES}
    modality_of = dict(zip(asked.rows.tolist(), asked.modalities, strict=True))

    def function(rows: np.ndarray) -> torch.Tensor | list:
        return classify[modality_of[rows[0]]](asked.images.take(rows))

    modalities = np.asarray(asked.modalities)
    groups = [asked.rows[modalities == modality] for modality in MODALITIES]
    batches = [batch for rows in groups for batch in in_batches(rows, settings.batch_size)]
    found = infer(accelerator, batches, function, journal)
    return [found[row] for row in asked.rows.tolist()]


def _classifier(
    qwen: QwenModel, text: str, prompts: QwenPrompts, settings: QwenSettings
) -> Callable[[torch.Tensor], torch.Tensor | list]:
    """Return a function from images to class probabilities, by the question `text`."""
    answers = {label: getattr(prompts.answers, label) for label in LABELS}
    if settings.method == "likelihood":
        question = prepare_question(qwen, text, [*answers.values()])
        return lambda images: answer_likelihoods(qwen, images, question).softmax(1)

    def by_text(images: torch.Tensor) -> list[list[float] | None]:
        said = generate_answers(qwen, images, text, settings.max_new_tokens)
        named = [parse_answer(answer, answers) for answer in said]
        return [label and [float(label == name) for name in LABELS] for label in named]

    return by_text
