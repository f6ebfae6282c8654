"""Qwen2.5-VL (Bai et al. 2025) as a zero-shot classifier: one image, one question, three answers.

All images of a modality are asked with the same tokens, and a batch holds one modality only: so no
row is padded, and no image can influence another.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from chest.compute import CheckpointError, Normalization, Source, load_normalization, to_pixels
from chest.errors import ParameterError
from chest.labels import LABELS


@dataclass(frozen=True)
class Reader:
    """The model with what turns images and questions into its inputs.

    ``template`` is the checkpoint's chat template.
    """

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: object
    template: str
    normalization: Normalization


def load_reader(source: Source, device: torch.device, dtype: torch.dtype) -> Reader:
    """Load model, tokenizer, chat template and preprocessor of a checkpoint, for inference."""
    source.load_config(Qwen2_5_VLConfig)  # another kind is told before its weights are fetched
    model = source.load_model(Qwen2_5_VLForConditionalGeneration.from_pretrained, dtype=dtype)
    tokenizer = source.load(AutoTokenizer.from_pretrained)
    # The processor's template knows images; the tokenizer's own may not. The processor itself is
    # not made: its video part needs torchvision.
    processor, _ = source.load(Qwen2_5_VLProcessor.get_processor_dict)
    template = processor.get("chat_template") or tokenizer.chat_template
    if template is None:
        raise CheckpointError(f"checkpoint {source}: it has no chat template")
    # The checkpoint's own settings sample, and penalise words that the question names.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Reader(model.to(device).eval(), tokenizer, template, load_normalization(source))


def visual_tokens(reader: Reader, side: int) -> int:
    """How many tokens an image of `side` x `side` px becomes: 64 for 224.

    Raises ParameterError where `side` is no multiple of a token's side (28 px): the model would
    have to resize the image.
    """
    vision = reader.model.config.vision_config
    token_side = vision.patch_size * vision.spatial_merge_size
    if side % token_side:
        raise ParameterError(
            f"image_size: {side} px, but Qwen2.5-VL needs a multiple of {token_side}"
        )
    return (side // token_side) ** 2


def prompt_ids(reader: Reader, question: str, side: int) -> list[int]:
    """Token ids of one image of `side` px and `question`, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = reader.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=reader.template,
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    image = reader.model.config.image_token_id
    if ids.count(image) != 1:
        raise CheckpointError(f"the chat template gives {ids.count(image)} places to one image")
    at = ids.index(image)
    return ids[:at] + [image] * visual_tokens(reader, side) + ids[at + 1 :]


def image_inputs(reader: Reader, images: np.ndarray) -> dict[str, torch.Tensor]:
    """The vision tower's inputs for uint8 grey `images`, (B, side, side), on the model's device.

    ``pixel_values``: (B * patches, channels * 2 * 14 * 14), patches in the order of the 2 x 2
    blocks that become one token, as the family's own preprocessor gives them for an image that
    needs no resize. ``image_grid_thw``: (B, 3).
    """
    vision = reader.model.config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    pixels = to_pixels(images, reader.normalization, reader.model.device)
    count, channels, side, _ = pixels.shape
    blocks = side // (patch * merge)
    cut = pixels.view(count, channels, blocks, merge, patch, blocks, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # image, block row and column, place in it, pixels
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], frames, patch, patch)  # a still picture, twice
    grid = torch.tensor([[1, side // patch, side // patch]], device=pixels.device)
    return {
        "pixel_values": cut.reshape(-1, channels * frames * patch * patch),
        "image_grid_thw": grid.expand(count, 3),
    }


@torch.inference_mode()
def answer_likelihoods(
    reader: Reader, images: np.ndarray, question: str, answers: Sequence[str]
) -> torch.Tensor:
    """Log-likelihood of each of the `answers` to `question` for each image, float32 (B, answers).

    `images` is uint8 grey, (B, side, side). An answer of several tokens scores the sum of their
    log-probabilities, each given the image, the question and the answer's tokens before it, and of
    the end-of-turn token: the probability that the model says just this answer and stops. There is
    no division by length: the answers are exclusive events, and their probabilities compare.

    One forward pass: the answers stand side by side behind the prompt, each sees the prompt and
    itself only, and each takes the positions that follow the prompt.
    """
    prompt = prompt_ids(reader, question, images.shape[1])
    branches = [reader.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    layout = _Branches(len(prompt), branches, reader.tokenizer.eos_token_id)
    device = reader.model.device
    ids = torch.tensor([[*prompt, *chain.from_iterable(branches)]], device=device).expand(
        len(images), -1
    )
    inputs = image_inputs(reader, images)
    hidden = reader.model.model(
        input_ids=ids.expand(len(images), -1),
        attention_mask=layout.mask(reader.model.dtype, device).expand(len(images), 1, -1, -1),
        position_ids=layout.positions(_prompt_positions(reader, prompt, inputs)),
        use_cache=False,
        **inputs,
    ).last_hidden_state[:, layout.speaking]
    logs = reader.model.lm_head(hidden).float().log_softmax(-1)
    spoken = torch.tensor(layout.spoken, device=device).view(1, -1, 1).expand(len(images), -1, 1)
    parts = logs.gather(2, spoken)[..., 0].split([len(b) + 1 for b in branches], dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)


class _Branches:
    """Where the answers lie behind a prompt of `start` tokens, and what each place must say."""

    def __init__(self, start: int, branches: list[list[int]], end: int):
        self.start, self.branches = start, branches
        self.speaking: list[int] = []  # places whose output is a prediction
        self.spoken: list[int] = []  # the token that each should predict
        place = start
        for branch in branches:
            self.speaking += [start - 1, *range(place, place + len(branch))]
            self.spoken += [*branch, end]
            place += len(branch)
        self.length = place

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What each place sees, added to its attention scores: 0 or the lowest; (1, 1, L, L)."""
        owner = torch.zeros(self.length, dtype=torch.long)
        owner[self.start :] = torch.repeat_interleave(
            torch.arange(len(self.branches)) + 1, torch.tensor([len(b) for b in self.branches])
        )
        seen = (owner[:, None] == owner[None]) | (owner[None] == 0)
        hidden = ~(seen & torch.ones_like(seen).tril())
        mask = torch.zeros(1, 1, *hidden.shape, dtype=dtype)
        return mask.masked_fill(hidden, torch.finfo(dtype).min).to(device)

    def positions(self, prompt: torch.Tensor) -> torch.Tensor:
        """Positions of all tokens, (3, B, L), from those of the prompt, (3, B, start)."""
        follow = torch.cat([torch.arange(len(b)) for b in self.branches]).to(prompt.device)
        last = prompt.amax(dim=(0, 2))
        return torch.cat([prompt, (last[:, None] + 1 + follow).expand(3, -1, -1)], dim=2)


def _prompt_positions(reader: Reader, prompt: list[int], inputs: dict) -> torch.Tensor:
    """Time, height and width of each token of the prompt, (3, B, tokens)."""
    grid = inputs["image_grid_thw"]
    ids = torch.tensor([prompt], device=grid.device)
    kinds = (ids == reader.model.config.image_token_id).int()
    one, _ = reader.model.model.get_rope_index(ids, kinds, image_grid_thw=grid[:1])
    return one.expand(3, len(grid), -1)


@torch.inference_mode()
def generate_answers(
    reader: Reader, images: np.ndarray, question: str, max_new_tokens: int
) -> list[str]:
    """What the model says to each of the uint8 grey `images`, (B, side, side): greedy decoding."""
    prompt = prompt_ids(reader, question, images.shape[1])
    ids = torch.tensor([prompt], device=reader.model.device).expand(len(images), -1)
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
