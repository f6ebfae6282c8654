"""Estimate, before anything long begins, the memory and time of each stage with a model.

The models are built from their configurations (a few kilobytes each, fetched from the hub if they
are no folders) without weights, and run on tensors without content: every allocation and every
multiplication of a batch is counted as if it had happened. Time is arithmetic over what a card
reaches of its peak rate in practice, or what its host takes to start so many operators.

    python tools/plan.py                          every stage of the profile, on the CARDS
    python tools/plan.py finetune_cnn             that stage, or all of its variants
    python tools/plan.py -S profile=study -S study.finetune_siglip.batch_size=64

A cell is the time on that card; "(8)": with 8 images at a time, since the batch does not fit; "no":
not even one image does. Starting and evaluating are not counted.
"""

import weakref
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import transformers
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.initialization import no_init_weights

from chest.core.errors import ParameterError
from chest.core.params import Params, load_params
from chest.core.runtime import parser, run_tool
from chest.core.tables import markdown
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.image_store import SHARE
from chest.models.encoders import FAMILIES, load_classifier
from chest.models.vlm.families import FAMILIES as VLM_FAMILIES

GIB = 2**30
CONTEXT = 0.6 * GIB  # CUDA, cuBLAS and cuDNN, before the first tensor
TRAIN, TEST = 0.8, 0.2  # shares of the images; validation and test are classified
# Measured with SigLIP on an H200: the share of the peak rate that is reached, and the seconds that
# the host takes to start one operator, however small. The longer of the two times counts.
REACHED, CALL = 0.2, 28e-6
TEXT_TOKENS, ANSWER_TOKENS = 64, 12  # of a question with its answers, and of the answers


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, and 1e12 operations a second in half precision, without sparsity."""

    name: str
    memory: float
    rate: float


# One for each usual size of memory; rates as the vendor states them.
CARDS = (
    Card("12 GB (RTX 3060)", 12, 25.6),
    Card("16 GB (T4)", 15, 65),
    Card("24 GB (RTX 3090)", 24, 71),
    Card("40 GB (A100)", 40, 312),
    Card("80 GB (H100)", 80, 989),
)


@dataclass(frozen=True)
class Cost:
    """What a stage takes: bytes of weights and optimizer (``fixed``) and of packed images.

    ``batch``: images at a time. ``active(n)``: bytes that n images at a time take. ``operations``:
    floating-point operations of the whole stage; ``calls``: operators that it starts.
    """

    fixed: float
    images: float
    batch: int
    active: Callable[[int], float]
    operations: float
    calls: float

    def needs(self, at_once: int) -> float:
        """Return the bytes for `at_once` images at a time, without packed images."""
        return CONTEXT + self.fixed + self.active(at_once)

    def seconds(self, card: Card, at_once: int) -> float:
        """Return the time on `card` with `at_once` images at a time."""
        computing = self.operations / (card.rate * 1e12 * REACHED)
        return max(computing, self.calls * CALL * self.batch / at_once)

    def fits(self, card: Card) -> int:
        """Return how many images at a time fit on `card`: the batch, halved until it does, or 0."""
        at_once, memory = self.batch, card.memory * GIB
        # Images stay in the host's memory unless they fit into a share of what is free at start.
        resident = self.images if self.images <= SHARE * (memory - CONTEXT) else 0
        while at_once and self.needs(at_once) + resident > memory:
            at_once //= 2
        return at_once


class Memory(TorchDispatchMode):
    """Counts the bytes of all living tensors but `weights`; ``peak``: the most at a time.

    ``calls``: how many results were new, and no view of another tensor.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__()
        self.known = weakref.WeakSet(x.untyped_storage() for x in weights)
        self.living = self.peak = self.calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self._add(storage.nbytes())
                self.calls += 1
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.living += size
        self.peak = max(self.peak, self.living)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    transformers.utils.logging.set_verbosity_error()
    params = override(load_params(), options.set)
    found = dict(blocks(params.content[params.profile]))
    if options.stage:
        found = {n: b for n, b in found.items() if f"{n}.".startswith(f"{options.stage}.")}
    if not found:
        raise ParameterError(f"{options.stage}: no stage with a model in {params.profile}")
    lines = []
    for name, block in found.items():
        cost = estimate(params, block)
        needs = (cost.needs(cost.batch) + cost.images) / GIB
        cells = [describe(cost, card) for card in CARDS]
        lines.append([name, f"{cost.fixed / GIB:.1f}", f"{needs:.1f}", *cells])
    print(
        f"Profile {params.profile}. GiB: weights with gradients and optimizer; all at its batch.\n"
    )
    print(markdown(["stage", "weights", "all", *(card.name for card in CARDS)], lines))


def read_options(arguments: Sequence[str] | None) -> Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("stage", nargs="?", metavar="STAGE", help="that stage alone (default: all with a model)")
    add("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="another parameter")
    return options.parse_args(arguments)


def override(params: Params, changes: Sequence[str]) -> Params:
    """Return `params` with the values of `changes`, ``key=value`` with dotted keys, as in DVC."""
    for change in changes:
        key, _, value = change.partition("=")
        *parents, last = key.split(".")
        section = params.content
        for parent in parents:
            section = section[parent]
        section[last] = yaml.safe_load(value)
    return Params(params.content, params.content["profile"], params.content["seed"])


def blocks(section: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """Yield the name and content of each block that names a checkpoint, however deep."""
    for name, block in section.items():
        if isinstance(block, dict) and {"checkpoint", "batch_size"} <= {*block}:
            yield prefix + name, block
        elif isinstance(block, dict):
            yield from blocks(block, f"{prefix}{name}.")


def describe(cost: Cost, card: Card) -> str:
    """Return the time of a stage on `card`, and the images at a time if the batch does not fit."""
    at_once = cost.fits(card)
    if not at_once:
        return "no"
    minutes = cost.seconds(card, at_once) / 60
    time = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{max(1, round(minutes))} min"
    return time if at_once == cost.batch else f"{time} ({at_once})"


def estimate(params: Params, block: dict) -> Cost:
    """Return what the stage of a `block` of params.yaml takes."""
    source = find_checkpoint(block["checkpoint"], block["revision"])
    epochs, side = block.get("epochs", 0), block["image_size"]
    at_once = block.get("micro_batch") or block["batch_size"]
    found = source.load(AutoConfig.from_pretrained)
    work = (
        image_model(source, block) if found.model_type in FAMILIES else language_model(found, side)
    )
    one, batch = (measure(work, n, training=epochs > 0) for n in (1, at_once))
    slope = (batch.peak - one.peak) / max(1, at_once - 1)

    total = sum((params.content[params.profile]["expected_counts"] or {}).values())
    passes = total if block.get("images") == "all" else total * TEST
    if epochs:  # a third of a step is its forward pass; validation is half of what is answered
        passes = total * (TRAIN * epochs + TEST / 2 * (epochs + 2) / 3)
    operations = batch.operations + work.more * at_once * (3 if epochs else 1)
    weights = [*work.model.parameters()]
    moments = 8 * sum(x.numel() for x in weights if x.requires_grad) if epochs else 0
    return Cost(
        fixed=sum(x.nbytes for x in weights) + moments,
        images=total * side**2,
        batch=at_once,
        active=lambda n: one.peak + slope * (n - 1),
        operations=operations * passes / at_once,
        calls=batch.calls * passes / at_once,
    )


@dataclass(frozen=True)
class Work:
    """A model without weights; ``run(n)`` is its forward pass for n images.

    ``more``: operations for each image that `run` leaves out.
    """

    model: nn.Module
    run: Callable[[int], torch.Tensor]
    more: float = 0.0


def image_model(source: Source, block: dict) -> Work:
    """Return the image encoder that a block of params.yaml names."""
    side, pooling = block["image_size"], block.get("pooling", "mean")
    with FakeTensorMode(), no_init_weights():
        model = load_classifier(source, side, pooling=pooling, random=True)
    return Work(model, lambda n: model(pixel_values=torch.empty(n, 3, side, side)).logits)


def language_model(config: PreTrainedConfig, side: int) -> Work:
    """Return the vision-language model of `config`, in bf16, frozen.

    Its vision tower multiplies each weight once for each patch of an image of `side` px.
    """
    with FakeTensorMode(), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    family, vision = VLM_FAMILIES[config.model_type], config.vision_config
    patches = (getattr(vision, "image_size", side) // vision.patch_size) ** 2
    length = family.image_tokens(config, side) + TEXT_TOKENS
    shape = length, config.get_text_config().hidden_size

    def run(n: int) -> torch.Tensor:
        tokens = torch.empty(n, *shape, dtype=torch.bfloat16, requires_grad=True)
        hidden = model.model.language_model(inputs_embeds=tokens).last_hidden_state
        return model.lm_head(hidden[:, -ANSWER_TOKENS:]).float().log_softmax(-1)

    tower = sum(x.numel() for x in model.get_submodule(family.vision.rstrip(".")).parameters())
    return Work(model, run, 2 * tower * patches)


@dataclass(frozen=True)
class Measured:
    """A batch: the bytes beside the weights at their peak, its operations and operators."""

    peak: int
    operations: int
    calls: int


def measure(work: Work, n: int, training: bool) -> Measured:
    """Return what a forward pass of n images takes, with the backward pass if `training`."""
    counter, memory = FlopCounterMode(display=False), Memory(work.model.parameters())
    with next(work.model.parameters()).fake_mode, memory, counter:
        precision = torch.autocast("cpu", torch.bfloat16)
        with nullcontext() if training else torch.no_grad(), precision:
            outputs = work.run(n)
        if training:
            outputs.float().sum().backward()
    work.model.zero_grad()
    return Measured(memory.peak, counter.get_total_flops(), memory.calls)


if __name__ == "__main__":
    run_tool(main)
