"""The likelihood of answers: how probable it is that the model says just this, and stops.

An answer may be spelled in several ways, which are exclusive events: their probabilities add up.
For the same reason likelihoods are not divided by the length of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from chest.models.common.pixels import Transform
from chest.models.vlm.families import Mask
from chest.models.vlm.model import Vlm, end_of_turn, image_inputs, prompt_ids


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its answers: what is the same for every image.

    All answers follow the prompt in one sequence, as a tree: spellings share the tokens of their
    common beginning. Each token attends to the prompt and to its own beginning only, at the
    position that it would have if nothing else was there.

    ``before``: keys and values of the tokens before the image, by layer; none while weights change.
    ``ids``, (1, L): the image, the rest of the prompt, and the tree. ``positions``, (..., 1, L),
    and ``mask``, (1, 1, L, before + L), cover the same.
    At ``places`` among the L, (P,), the model predicts: an answer's k-th token from the k-th of
    ``steps``, int64 (2, S): rows of ``places`` and tokens, of one answer after the other.
    ``lengths``: steps of each answer, the end of turn included. ``spellings``: answers of a class.
    """

    before: list[tuple[torch.Tensor, torch.Tensor]]
    ids: torch.Tensor
    positions: torch.Tensor
    mask: Mask
    places: torch.Tensor
    steps: torch.Tensor
    lengths: list[int]
    spellings: list[int]


def prepare_question(
    vlm: Vlm, text: str, classes: Sequence[Sequence[str]], image: bool = True, share: bool = True
) -> Question:
    """Tokenize the question `text` and the answers of all `classes`: spellings of each.

    With `share` the tokens before the image are computed here, once for all images.
    """
    answers = [
        vlm.tokenizer(spelling, add_special_tokens=False)["input_ids"]
        for spellings in classes
        for spelling in spellings
    ]
    prompt = prompt_ids(vlm, text, image)
    tree = sorted({tuple(ids[: i + 1]) for ids in answers for i in range(len(ids))}, key=len)
    ids = torch.tensor([*prompt, *(path[-1] for path in tree)], device=vlm.model.device)
    positions = _positions(vlm, ids[None, : len(prompt)], [len(path) for path in tree])
    seen = _seen(len(prompt), tree).to(ids.device)
    at = positions.flatten(0, -2).amax(0)
    mask = vlm.family.mask(vlm.config, seen, ids, at)
    start = _shared(prompt, vlm.config.image_token_id if image else None) if share else 0
    places, steps = _steps(answers, tree, len(prompt) - start, end_of_turn(vlm))
    return Question(
        before=_keys_and_values(vlm, ids[None, :start], positions[..., :start]) if start else [],
        ids=ids[None, start:],
        positions=positions[..., start:],
        mask=_map(mask, lambda whole: whole[..., start:, :]),
        places=places.to(ids.device),
        steps=steps.to(ids.device),
        lengths=[len(answer) + 1 for answer in answers],
        spellings=[len(spellings) for spellings in classes],
    )


def encode(vlm: Vlm, images: torch.Tensor, transform: Transform | None = None) -> ModelOutput:
    """Return what the vision tower makes of uint8 grey `images`, (B, side, side).

    ``pooler_output`` has B items, the tokens that the language model reads. `transform` may change
    the images first, as in to_pixels.
    """
    return vlm.model.model.get_image_features(**image_inputs(vlm, images, transform))


def class_likelihoods(vlm: Vlm, image: ModelOutput | None, question: Question) -> torch.Tensor:
    """Return the log-likelihood of each class for encoded images, (B, classes).

    It is the log-probability that the model says one of the class's answers and stops. `image` is
    None for a question without image; B is then 1.
    """
    answers = answer_likelihoods(vlm, image, question)
    classes = [own.logsumexp(1) for own in answers.split(question.spellings, 1)]
    return torch.stack(classes, 1)


def answer_likelihoods(vlm: Vlm, image: ModelOutput | None, question: Question) -> torch.Tensor:
    """Return the log-likelihood of each answer, (B, answers); see `class_likelihoods`."""
    hidden = read(vlm, image, question).last_hidden_state
    logits = linear(vlm.model.lm_head, hidden[:, question.places])
    rows, tokens = question.steps
    logs = logits[:, rows, tokens] - logits.logsumexp(2)[:, rows]
    return torch.stack([steps.sum(1) for steps in logs.split(question.lengths, 1)], 1)


def read(vlm: Vlm, image: ModelOutput | None, question: Question, **options) -> ModelOutput:
    """Run the language model on encoded images, in one pass; `options` go to its ``forward``."""
    count = 1 if image is None else len(image.pooler_output)
    cache = None
    if question.before:
        cache = DynamicCache([tuple(_repeat(x, count) for x in own) for own in question.before])
    return vlm.model.model(
        input_ids=question.ids.expand(count, -1),
        attention_mask=_map(question.mask, lambda mask: _repeat(mask, count)),
        position_ids=question.positions.expand(*question.positions.shape[:-2], count, -1),
        past_key_values=cache,
        use_cache=cache is not None,
        mm_encoder_outputs={} if image is None else {"image": image},
        **options,
    )


def linear(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a last layer to `hidden`, (..., d), in fp32 or, of fp64 weights, in fp64.

    In bf16 a logit of 20 is wrong by up to 0.06, and a log-likelihood by as much a token.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.to(dtype), layer.weight.to(dtype), bias)


def _shared(prompt: list[int], image: int | None) -> int:
    """Return how many tokens come before the image, or without one before the last token."""
    return len(prompt) - 1 if image is None else prompt.index(image)


def _positions(vlm: Vlm, prompt: torch.Tensor, depths: list[int]) -> torch.Tensor:
    """Return the positions of the prompt, (1, tokens), and of tokens at `depths` behind it."""
    own = vlm.family.positions(vlm.model, prompt, vlm.side)
    behind = own.amax() + torch.tensor(depths, dtype=own.dtype, device=own.device)
    return torch.cat([own, behind.expand(*own.shape[:-1], -1)], dim=-1)


def _seen(prompt: int, tree: list[tuple[int, ...]]) -> torch.Tensor:
    """Return which tokens each token attends to, bool (L, L)."""
    length = prompt + len(tree)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    own = [[path[: len(other)] == other for other in tree] for path in tree]
    seen[prompt:, prompt:] = torch.tensor(own, dtype=torch.bool).reshape(len(tree), len(tree))
    return seen


def _steps(
    answers: list[list[int]], tree: list[tuple[int, ...]], prompt: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``places`` and ``steps`` of a Question whose prompt has `prompt` tokens."""
    row = {(): 0} | {path: i + 1 for i, path in enumerate(tree)}
    steps = [
        (row[tuple(answer[:i])], token)
        for answer in answers
        for i, token in enumerate([*answer, end])
    ]
    # The prompt's last token predicts the first one of each answer.
    places = torch.arange(prompt - 1, prompt + len(tree))
    return places, torch.tensor(steps, dtype=torch.int64).reshape(-1, 2).T


@torch.inference_mode()
def _keys_and_values(
    vlm: Vlm, ids: torch.Tensor, positions: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = DynamicCache()
    vlm.model.model.language_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _map(mask: Mask, function) -> Mask:
    if isinstance(mask, dict):
        return {name: function(own) for name, own in mask.items()}
    return function(mask)


def _repeat(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.expand(count, -1, -1, -1)
