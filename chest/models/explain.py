"""Relevance maps of SigLIP models: how much each patch contributes to the score of a class.

Attention, weighted by the gradient of the class score, is accumulated over the layers (Chefer et
al. 2021, arXiv:2103.15679).
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
    """Return the relevance of each patch for `classes`, int (B,): float32 (B, rows, columns).

    `pixels` is normalized, (B, 3, side, side). Values are at least 0, and comparable within an
    image only.
    """
    with _eager_attention(model):
        output = model(pixel_values=pixels, output_attentions=True)
    layers = _relevance(_margin(output.logits, classes), output.attentions)
    # The mean over tokens, as the classifier takes it, without the identity.
    return _as_grid(_rollout(layers).mean(1) - 1 / layers[0].shape[-1])


def relevance_of_prompts(
    model: SiglipModel, pixels: torch.Tensor, texts: torch.Tensor, classes: np.ndarray
) -> np.ndarray:
    """Return the relevance as above, for the similarity with the class embeddings `texts`, (3, d).

    The image's embedding is not normalized, which does not change the ranking of the classes: the
    gradient of a cosine vanishes as the cosine approaches 1.
    """
    with _eager_attention(model):
        output = model.vision_model(pixel_values=pixels, output_attentions=True)
    pooled, pooling = pool(model.vision_model.head, output.last_hidden_state)
    margin = _margin(pooled @ texts.clone().T, classes)  # inference tensors allow no gradient
    *layers, last = _relevance(margin, [*output.attentions, pooling])
    return _as_grid((last @ _rollout(layers))[:, 0])


def pool(head: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply SigLIP's attention pooling `head` to `tokens`, (B, n, d).

    Returns the embeddings, (B, d), and the attention to the tokens, (B, heads, 1, n), which the
    forward of `head` does not return.
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
    """Use the attention implementation that returns its weights."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _margin(scores: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
    """Return the score of each image's class minus the mean of the other classes', (B,)."""
    own = scores.gather(1, torch.tensor(classes, device=scores.device)[:, None])[:, 0]
    return own - (scores.sum(1) - own) / (scores.shape[1] - 1)


def _relevance(score: torch.Tensor, attentions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the relevance of attention for `score`, (B,): (B, to, from) for each layer.

    `attentions` are (B, heads, to, from). Attention that lowers the score counts as 0.
    """
    gradients = torch.autograd.grad(score.sum(), attentions)
    return [
        (attention.detach() * gradient).clamp(min=0).mean(1)
        for attention, gradient in zip(attentions, gradients, strict=True)
    ]


def _rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the relevance of each patch for each token after all `layers`, (B, n, n)."""
    total = torch.eye(layers[0].shape[-1], device=layers[0].device, dtype=layers[0].dtype)
    for layer in layers:
        total = total + layer @ total
    return total


def _as_grid(values: torch.Tensor) -> np.ndarray:
    side = math.isqrt(values.shape[1])
    return values.clamp(min=0).unflatten(1, (side, side)).float().cpu().numpy()
