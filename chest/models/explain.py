"""What the answer of a SigLIP model depends on, patch by patch.

The attention that speaks for a class rather than the others is followed from the answer through the
layers to the patches (Chefer et al. 2021, arXiv:2103.15679). It was chosen by what happens when the
most marked patches are removed first. Area under the probability of the class, for a model
fine-tuned on phantoms, less is better: 0.31 so, 0.48 by attention rollout, 0.71 at random.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel, SiglipForImageClassification, SiglipModel


def relevance_of_classifier(
    model: SiglipForImageClassification, pixels: torch.Tensor, classes: np.ndarray
) -> np.ndarray:
    """Return how far each patch speaks for `classes`, int (B,): float32 (B, rows, columns).

    `pixels` is normalized, (B, 3, side, side). Values begin at 0; only those of one image compare.
    """
    with _eager_attention(model):
        output = model(pixel_values=pixels, output_attentions=True)
    layers = _relevance(_margin(output.logits, classes), output.attentions)
    # The classifier takes the mean of all tokens; each sees its own patch anyway.
    return _as_grid(_rollout(layers).mean(1) - 1 / layers[0].shape[-1])


def relevance_of_prompts(
    model: SiglipModel, pixels: torch.Tensor, texts: torch.Tensor, classes: np.ndarray
) -> np.ndarray:
    """As relevance_of_classifier, by the similarity with the class embeddings `texts`, (3, d).

    The image's embedding keeps its length, which does not change the answer: the gradient of the
    cosine would vanish where it is large.
    """
    with _eager_attention(model):
        output = model.vision_model(pixel_values=pixels, output_attentions=True)
    pooled, pooling = pool(model.vision_model.head, output.last_hidden_state)
    margin = _margin(pooled @ texts.clone().T, classes)  # a copy can be part of a graph
    *layers, last = _relevance(margin, [*output.attentions, pooling])
    return _as_grid((last @ _rollout(layers))[:, 0])


def pool(head: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool `tokens`, (B, n, d), as SigLIP's attention pooling `head` does.

    Returns the embeddings, (B, d), and the attention of each head to the tokens, (B, heads, 1, n),
    which `head` itself does not return.
    """
    attention = head.attention
    probe = head.probe.expand(len(tokens), -1, -1)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (
        linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((probe, tokens, tokens), weights, biases, strict=True)
    )
    shares = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1)
    pooled = attention.out_proj((shares @ value).transpose(1, 2).flatten(2))
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0], shares


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute attention in the one way that returns it."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _margin(scores: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
    """Return by how much each image's class is above the mean of the others, (B,)."""
    own = scores.gather(1, torch.tensor(classes, device=scores.device)[:, None])[:, 0]
    return own - (scores.sum(1) - own) / (scores.shape[1] - 1)


def _relevance(score: torch.Tensor, attentions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return how far attention raises `score`, (B,): (B, to, from) of each layer.

    `attentions` are (B, heads, to, from). What lowers the score counts as 0.
    """
    gradients = torch.autograd.grad(score.sum(), attentions)
    return [
        (attention.detach() * gradient).clamp(min=0).mean(1)
        for attention, gradient in zip(attentions, gradients, strict=True)
    ]


def _rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what each token takes from each patch through all `layers`, (B, n, n)."""
    taken = torch.eye(layers[0].shape[-1], device=layers[0].device, dtype=layers[0].dtype)
    for layer in layers:
        taken = taken + layer @ taken
    return taken


def _as_grid(values: torch.Tensor) -> np.ndarray:
    side = math.isqrt(values.shape[1])
    return values.clamp(min=0).unflatten(1, (side, side)).float().cpu().numpy()
