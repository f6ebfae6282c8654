"""What the answer of a SigLIP model depends on, patch by patch, and a picture of it.

The attention that speaks for a class rather than the others is followed from the answer through the
layers to the patches (Chefer et al. 2021, arXiv:2103.15679). It was chosen by what happens when the
most marked patches are removed first. Area under the probability of the class, the fine-tuned model
on phantoms of the test split, less is better: 0.31 so, 0.48 by attention rollout, 0.71 at random;
and 0.69 by the tokens' exact shares of the logit, since each token has seen all patches by then.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import linear
from transformers import PreTrainedModel, SiglipForImageClassification, SiglipModel

from chest.files import replacing

# Perceptually uniform, and told apart from grey by people of any colour vision.
SCALE = "viridis"
STYLE = {"font.size": 11, "axes.titlesize": 11, "text.parse_math": False}


def look_of_classifier(
    model: SiglipForImageClassification, pixels: torch.Tensor, classes: np.ndarray
) -> np.ndarray:
    """How far each patch of `pixels` speaks for `classes`, int (B,), by the logits.

    `pixels` is normalized, (B, 3, side, side). Returns float32 (B, rows, columns) of patches, from
    0; only values of one image compare.
    """
    with _attending(model):
        output = model(pixel_values=pixels, output_attentions=True)
    layers = _raising(_margin(output.logits, classes), output.attentions)
    # The classifier takes the mean of all places; each sees its own patch anyway.
    return _as_grid(_follow(layers).mean(1) - 1 / layers[0].shape[-1])


def look_of_prompts(
    model: SiglipModel, pixels: torch.Tensor, texts: torch.Tensor, classes: np.ndarray
) -> np.ndarray:
    """As look_of_classifier, by the similarity with the classes' `texts`, (3, d).

    The image's vector keeps its length, which is no matter to the answer: the cosine's gradient
    would vanish where it is large.
    """
    with _attending(model):
        output = model.vision_model(pixel_values=pixels, output_attentions=True)
    pooled, paid = pool(model.vision_model.head, output.last_hidden_state)
    margin = _margin(pooled @ texts.clone().T, classes)
    *layers, last = _raising(margin, [*output.attentions, paid])
    return _as_grid((last @ _follow(layers))[:, 0])


def pool(head: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's attention pooling of `tokens`, (B, n, d), as `head` does it: the vectors, (B, d).

    And the attention that each of its heads pays to the tokens, (B, heads, 1, n), which `head`
    itself does not give.
    """
    attention = head.attention
    probe = head.probe.expand(len(tokens), -1, -1)
    query, key, value = (
        linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip(
            (probe, tokens, tokens), attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3), strict=True,
        )
    )  # fmt: skip
    paid = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1)
    vectors = attention.out_proj((paid @ value).transpose(1, 2).flatten(2))
    return (vectors + head.mlp(head.layernorm(vectors)))[:, 0], paid


@contextmanager
def _attending(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute its attention in the one way that gives it out."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _margin(scores: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
    """By how much each image's class is above the mean of the others, (B,); `scores` (B, n)."""
    own = scores.gather(1, torch.tensor(classes, device=scores.device)[:, None])[:, 0]
    return own - (scores.sum(1) - own) / (scores.shape[1] - 1)


def _raising(score: torch.Tensor, attentions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """How far attention raises `score`, (B,): for each layer (B, to, from), the mean of its heads.

    `attentions` are (B, heads, to, from). What lowers the score counts as 0.
    """
    gradients = torch.autograd.grad(score.sum(), attentions)
    return [
        (attention.detach() * gradient).clamp(min=0).mean(1)
        for attention, gradient in zip(attentions, gradients, strict=True)
    ]


def _follow(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """What each place takes from each patch through all `layers`, first to last, (B, n, n)."""
    taken = torch.eye(layers[0].shape[-1], device=layers[0].device)
    for layer in layers:
        taken = taken + layer @ taken
    return taken


def _as_grid(values: torch.Tensor) -> np.ndarray:
    """(B, patches) as (B, rows, columns)."""
    side = math.isqrt(values.shape[1])
    return values.clamp(min=0).unflatten(1, (side, side)).float().cpu().numpy()


def draw_look(
    path: Path, image: np.ndarray, look: np.ndarray, title: str, file: str, note: str
) -> None:
    """The input beside itself with what the answer depends on: `title`, `file` above, `note` below.

    `image` is uint8, (side, side); `look` (rows, columns) of patches, from 0.
    """
    side = len(image)
    share = look / max(look.max(), np.finfo(look.dtype).tiny)
    where = {"extent": (0, side, side, 0), "cmap": SCALE, "vmin": 0, "vmax": 1}
    # Whatever style a user has set: the same bytes on every machine.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        figure.suptitle(f"{file}\n{title}", x=0.01, ha="left")
        for axes, heading in zip(
            figure.subplots(1, 2),
            (f"As the model sees it ({side} x {side} px)", "What this answer depends on"),
            strict=True,
        ):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=where["extent"])
            axes.set_title(heading, loc="left")
            axes.set(xticks=[], yticks=[])
        heat = axes.imshow(share, alpha=0.6 * share, **where)
        figure.colorbar(heat, ax=axes, label="share of the strongest patch", ticks=[0, 0.5, 1])
        figure.supxlabel(note, x=0.01, ha="left", size=11)
        with replacing(path) as partial:
            # Without the library's version, so that the same picture gives the same bytes.
            figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
