"""Qwen2.5-VL (Bai et al. 2025) as a zero-shot classifier: one image, one question, three answers.

All images of a modality are asked with the same tokens, and a batch holds one modality only: so no
row is padded, and no image can influence another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import MethodType

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from chest.answering import answer, in_batches
from chest.compute import (
    CheckpointError,
    Normalization,
    Source,
    describe,
    load_normalization,
    to_pixels,
)
from chest.errors import ParameterError
from chest.labels import LABELS, MODALITIES
from chest.params import QwenPrompts, ZeroshotQwen
from chest.resident import Images
from chest.resume import Journal


@dataclass(frozen=True)
class Reader:
    """The model with what turns images of `side` px and questions into its inputs.

    ``template`` is the checkpoint's chat template.
    """

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: object
    template: str
    normalization: Normalization
    side: int


def load_reader(source: Source, side: int, accelerator: Accelerator) -> Reader:
    """Load model, tokenizer, chat template and preprocessor of a checkpoint, for inference.

    The weights are bf16 where matrix products are. Another kind of checkpoint, and images that it
    cannot take, are told before its weights are fetched.
    """
    config = source.load_config(Qwen2_5_VLConfig)
    with source.reading("config.json"):
        visual_tokens(config, side)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model = source.load_model(
        Qwen2_5_VLForConditionalGeneration.from_pretrained, config=config, dtype=dtype
    )
    tokenizer = source.load(AutoTokenizer.from_pretrained, "tokenizer")
    if tokenizer.eos_token_id is None:
        raise source.unfit("its tokenizer has no end token")
    # The processor's template knows images; the tokenizer's own may not. The processor itself is
    # not made: its video part needs torchvision.
    processor, _ = source.load(Qwen2_5_VLProcessor.get_processor_dict, "chat template")
    with source.reading("chat template"):
        template = processor.get("chat_template") or tokenizer.chat_template
    if not isinstance(template, str):
        raise source.unfit("it has no chat template, or several")
    # The checkpoint's own settings sample, and penalise words that the question names.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(accelerator.device).eval()
    reader = Reader(model, tokenizer, template, load_normalization(source), side)
    with source.reading("config.json or tokenizer"):
        attend_at_once(model, side)
        # One answer to a black image: settings that fit no weights or tokens show themselves here.
        black = torch.zeros(1, side, side, dtype=torch.uint8, device=accelerator.device)
        answer_likelihoods(reader, black, pose(reader, "?", ["normal"]))
    return reader


def visual_tokens(config: Qwen2_5_VLConfig, side: int) -> int:
    """How many tokens an image of `side` x `side` px becomes: 64 for 224.

    Raises ParameterError where `side` is no multiple of a token's side (28 px): the model would
    have to resize the image.
    """
    vision = config.vision_config
    token_side = vision.patch_size * vision.spatial_merge_size
    if side % token_side:
        raise ParameterError(
            f"image_size: {side} px, but Qwen2.5-VL needs a multiple of {token_side}"
        )
    return (side // token_side) ** 2


def prompt_ids(reader: Reader, question: str) -> list[int]:
    """Token ids of one image and `question`, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        text = reader.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=reader.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # the template is a program of the checkpoint's
        raise CheckpointError(
            f"checkpoint {reader.model.name_or_path}: its chat template or tokenizer cannot be"
            f" used ({describe(error)}); fetch it again, or name another one"
        ) from None
    image = reader.model.config.image_token_id
    if ids.count(image) != 1:
        raise CheckpointError(f"the chat template gives {ids.count(image)} places to one image")
    at = ids.index(image)
    return ids[:at] + [image] * visual_tokens(reader.model.config, reader.side) + ids[at + 1 :]


# --- Images ----------------------------------------------------------------------------------


def image_inputs(reader: Reader, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The vision tower's inputs for uint8 grey `images`, (B, side, side), on the model's device.

    ``pixel_values``: (B * patches, channels * 2 * 14 * 14), patches in the order of the 2 x 2
    blocks that become one token, as the family's own preprocessor gives them for an image that
    needs no resize. ``image_grid_thw``: (B, 3).
    """
    layout = _vision_layout(reader, len(images))
    return {"pixel_values": _patches(reader, images), "image_grid_thw": layout["grid_thw"]}


def _patches(reader: Reader, images: torch.Tensor) -> torch.Tensor:
    """The ``pixel_values`` of image_inputs."""
    vision = reader.model.config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    pixels = to_pixels(images, reader.normalization)
    count, channels, side, _ = pixels.shape
    blocks = side // (patch * merge)
    cut = pixels.view(count, channels, blocks, merge, patch, blocks, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block row and column, place in it, pixels
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], frames, patch, patch)  # a still picture, twice
    return cut.reshape(-1, channels * frames * patch * patch)


def image_tokens(reader: Reader, images: torch.Tensor) -> torch.Tensor:
    """What the vision tower makes of uint8 grey `images`, (B, side, side): (B, tokens, d)."""
    patches = _patches(reader, images).to(reader.model.dtype)
    layout = _vision_layout(reader, len(images))
    tokens = reader.model.model.visual(patches, **layout).pooler_output
    return tokens.view(len(images), -1, tokens.shape[-1])


def attend_at_once(model: Qwen2_5_VLForConditionalGeneration, side: int) -> None:
    """Let the vision tower attend within all windows of all images in one call a layer.

    transformers calls once for each window: 256 times a layer for 64 images of 224 px. Where a
    window at the border is smaller than the others, that is left as it is.
    """
    vision = model.config.vision_config
    if (side // vision.patch_size) % (vision.window_size // vision.patch_size) == 0:
        for block in model.model.visual.blocks:
            block.attn.forward = MethodType(_attend, block.attn)


def _attend(
    attention,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_,
) -> torch.Tensor:
    """Qwen2_5_VLVisionAttention.forward for windows of one length; (all patches, d)."""
    windows = len(cu_seqlens) - 1
    parts = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    turned = apply_rotary_pos_emb_vision(*parts[:2], *position_embeddings)
    query, key, value = (
        part.unflatten(0, (windows, -1)).transpose(1, 2) for part in (*turned, parts[2])
    )
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).reshape(len(hidden_states), -1))


def _vision_layout(reader: Reader, count: int) -> dict[str, torch.Tensor]:
    """Frames, rows and columns of patches of `count` images, their positions and windows."""
    vision = reader.model.config.vision_config
    sizes = (vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return _layout(*sizes, reader.side // vision.patch_size, count, reader.model.device)


@cache  # the same for every batch
def _layout(
    merge: int, window: int, patch: int, patches: int, count: int, device: torch.device
) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, patches, patches]]).expand(count, -1)
    index, cuts = get_vision_window_index(grid, merge, window, patch)
    with torch.inference_mode(False):
        return {
            "grid_thw": grid.to(device),
            "position_ids": get_vision_position_ids(grid, merge).to(device),
            "cu_seqlens": get_vision_cu_seqlens(grid).to(device),
            "window_index": index.to(device),
            "cu_window_seqlens": cuts.to(device),
        }


# --- The likelihood of answers ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its answers, and all of it that is the same for every image.

    The answers stand side by side behind the prompt: each sees the prompt and itself only, and
    takes the positions that follow the prompt. What stands before the image is computed once:
    ``before`` holds its keys and values, layer by layer. ``after``: the embedded tokens behind the
    image, (tokens, d); ``positions``, (3, 1, L), and ``mask``, (1, 1, L, before + L), are of the
    image's tokens and those. ``places`` of these L are where the model speaks; the answers' tokens
    are ``spoken`` at the places ``at`` of these, ``lengths`` tokens each with the end of turn.
    """

    before: list[tuple[torch.Tensor, torch.Tensor]]
    after: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor
    at: torch.Tensor
    spoken: torch.Tensor
    lengths: list[int]


@torch.inference_mode()
def pose(reader: Reader, text: str, answers: Sequence[str]) -> Question:
    """Make the Question of `text` with its `answers`."""
    prompt = prompt_ids(reader, text)
    branches = [reader.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    start, device = prompt.index(reader.model.config.image_token_id), reader.model.device
    tokens = visual_tokens(reader.model.config, reader.side)
    ids = torch.tensor([*prompt, *chain.from_iterable(branches)], device=device)
    positions = _positions(reader, prompt, branches)
    language, embed = reader.model.model.language_model, reader.model.get_input_embeddings()
    cached = language(
        inputs_embeds=embed(ids[None, :start]), position_ids=positions[..., :start], use_cache=True
    ).past_key_values
    speaking, spoken, place = [], [], len(prompt) - start
    for branch in branches:
        speaking += [len(prompt) - start - 1, *range(place, place + len(branch))]
        spoken += [*branch, reader.tokenizer.eos_token_id]
        place += len(branch)
    places = sorted(set(speaking))
    return Question(
        before=[(layer.keys, layer.values) for layer in cached.layers],
        after=embed(ids[start + tokens :]),
        positions=positions[..., start:],
        mask=_mask(len(prompt), branches, reader.model.dtype).to(device)[..., start:, :],
        places=torch.tensor(places, device=device),
        at=torch.tensor([places.index(place) for place in speaking], device=device),
        spoken=torch.tensor(spoken, device=device),
        lengths=[len(branch) + 1 for branch in branches],
    )


@torch.inference_mode()
def answer_likelihoods(reader: Reader, images: torch.Tensor, question: Question) -> torch.Tensor:
    """Log-likelihood of each answer to `question` for each image, float32 (B, answers).

    `images` is uint8 grey, (B, side, side). An answer of several tokens scores the sum of their
    log-probabilities, each given the image, the question and the answer's tokens before it, and of
    the end-of-turn token: the probability that the model says just this answer and stops. There is
    no division by length: the answers are exclusive events, and their probabilities compare. One
    forward pass.
    """
    count = len(images)
    cached = DynamicCache(
        [tuple(x.expand(count, -1, -1, -1) for x in layer) for layer in question.before]
    )
    after = question.after.expand(count, -1, -1)
    hidden = reader.model.model.language_model(
        inputs_embeds=torch.cat([image_tokens(reader, images), after], dim=1),
        attention_mask=question.mask.expand(count, -1, -1, -1),
        position_ids=question.positions.expand(-1, count, -1),
        past_key_values=cached,
        use_cache=True,
    ).last_hidden_state[:, question.places]
    logs = reader.model.lm_head(hidden).float().log_softmax(-1)
    parts = logs[:, question.at, question.spoken]
    return torch.stack([x.sum(1) for x in parts.split(question.lengths, dim=1)], dim=1)


def _positions(reader: Reader, prompt: list[int], branches: list[list[int]]) -> torch.Tensor:
    """Time, height and width of each token of prompt and answers, (3, 1, L)."""
    model, device = reader.model, reader.model.device
    ids = torch.tensor([prompt], device=device)
    kinds = (ids == model.config.image_token_id).int()
    grid = _vision_layout(reader, 1)["grid_thw"]
    own, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
    follow = torch.cat([torch.arange(len(branch)) for branch in branches]).to(device)
    return torch.cat([own, (own.amax() + 1 + follow).expand(3, 1, -1)], dim=2)


def _mask(start: int, branches: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """What each place sees, added to its attention scores: 0 or the lowest; (1, 1, L, L)."""
    lengths = [start, *map(len, branches)]  # the prompt is of branch 0, which all see
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
    hidden = ~(seen & torch.ones_like(seen).tril())
    mask = torch.zeros(1, 1, *hidden.shape, dtype=dtype)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)


# --- Free text -------------------------------------------------------------------------------


@torch.inference_mode()
def generate_answers(
    reader: Reader, images: torch.Tensor, question: str, max_new_tokens: int
) -> list[str]:
    """What the model says to each of the uint8 grey `images`, (B, side, side): greedy decoding."""
    ids = torch.tensor([prompt_ids(reader, question)], device=reader.model.device)
    ids = ids.expand(len(images), -1)
    output = reader.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == reader.model.config.image_token_id).int(),
        max_new_tokens=max_new_tokens,
        **image_inputs(reader, images),
    )
    said = reader.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def parse_answer(text: str, answers: Mapping[str, str]) -> str | None:
    """The one class whose answer `text` names; None where it names none, or several.

    `answers` maps each class to its answer. Case, and what stands between an answer's words and
    numbers, do not count (COVID-19, covid 19); an answer inside a longer word does (abnormal).
    """
    named = [label for label in LABELS if _names(text, answers[label])]
    return named[0] if len(named) == 1 else None


def _names(text: str, answer: str) -> bool:
    parts = re.findall(r"[^\W\d_]+|\d+", answer)
    pattern = r"(?<![^\W_])" + r"[\W_]*".join(map(re.escape, parts)) + r"(?![^\W_])"
    return re.search(pattern, text, re.IGNORECASE) is not None


# --- Many images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What is asked of these `rows`, int64 (n,), of the images; ``modalities`` is (n,) of str."""

    images: Images
    rows: np.ndarray
    modalities: np.ndarray
    prompts: QwenPrompts
    settings: ZeroshotQwen


def ask_rows(
    accelerator: Accelerator, reader: Reader, asked: Asked, journal: Journal | None = None
) -> list[list[float] | None]:
    """Probabilities of the classes for each row; None where the answer names no class.

    Images of one modality are asked with the same words: a batch holds one modality only.
    """
    wordings = asked.prompts.answers.model_dump()
    texts = {
        kind: asked.prompts.question.format(modality=getattr(asked.prompts.modality, kind))
        for kind in MODALITIES
    }
    likely = asked.settings.method == "likelihood"
    questions = {
        kind: pose(reader, text, [wordings[label] for label in LABELS]) if likely else text
        for kind, text in texts.items()
    }
    modality = dict(zip(asked.rows.tolist(), asked.modalities, strict=True))

    def ask(rows: np.ndarray) -> torch.Tensor | list[list[float] | None]:
        images, question = asked.images.take(rows), questions[modality[rows[0]]]
        if likely:
            return answer_likelihoods(reader, images, question).softmax(1)
        said = generate_answers(reader, images, question, asked.settings.max_new_tokens)
        named = [parse_answer(text, wordings) for text in said]
        return [name and [float(label == name) for label in LABELS] for name in named]

    batches = [
        batch
        for kind in MODALITIES
        for batch in in_batches(asked.rows[asked.modalities == kind], asked.settings.batch_size)
    ]
    answers = answer(accelerator, batches, ask, journal)
    return [answers[row] for row in asked.rows.tolist()]
