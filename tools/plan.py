"""Estimate, before anything long begins, the memory and time of each stage with a model.

The models are built from their configurations (a few kilobytes each, fetched from the hub if they
are no folders) without weights, and run on tensors without content: every allocation and every
multiplication of a batch is counted as if it had happened. Time is arithmetic over what a card
reaches of its peak rate in practice, or what its host takes to start so many operators.

    python tools/plan.py                          every stage of the profile, on the CARDS
    python tools/plan.py finetune_cnn             that stage, or all of its variants
    python tools/plan.py -S profile=study -S study.finetune_siglip.batch_size=64

A cell is the time on that card; "(8)": with 8 images at a time, since the batch does not fit; "no":
not even one image does; "?": a stage that this tool does not know, or a checkpoint that it cannot
read. Starting, loading and evaluating are not counted.
"""

import sys
import warnings
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipConfig, SiglipModel
from transformers.initialization import no_init_weights

from chest.core.errors import ParameterError
from chest.core.params import Params, load_params
from chest.core.runtime import parser, run_tool
from chest.core.tables import markdown
from chest.models.common.checkpoints import CheckpointError, find_checkpoint
from chest.models.common.device import MIXED
from chest.models.common.image_store import SHARE
from chest.models.encoders import load_classifier
from chest.models.lungs import UNetConfig, make_segmenter
from chest.models.siglip import TEXT_LENGTH
from chest.models.vlm.adapter import LoraSettings, target_modules
from chest.models.vlm.families import FAMILIES

GIB = 2**30
CONTEXT = 0.6 * GIB  # CUDA, cuBLAS and cuDNN, before the first tensor
TRAIN, TEST = 0.8, 0.2  # shares of the images; validation and test are classified
FILMS = 0.05  # share of X-rays in the study, which a network segments
REGIONS = 5  # whose features probe_regions computes
# Measured with SigLIP on an H200: the share of the peak rate that is reached, and the seconds that
# the host takes to start one operator, however small. The longer of the two times counts.
REACHED, CALL = 0.2, 28e-6
# Work space and fragments: on a CPU a batch took 1.2 to 1.8 times the memory of its tensors.
OVERHEAD = 1.4
TEXT_TOKENS, ANSWER_TOKENS = 64, 12  # of a question with its answers, and of the answers
QUESTIONS, PICTURES = 10, 2  # with its controls, an image is asked about so often, in two pictures


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
        return CONTEXT + self.fixed + OVERHEAD * self.active(at_once)

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
    lines = [line_of(params, name, block) for name, block in found.items()]
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
    """Yield the name and content of each block of a stage with a model, however deep."""
    for name, block in section.items():
        if not isinstance(block, dict):
            continue
        if "batch_size" not in block:
            yield from blocks(block, f"{prefix}{name}.")
        elif block.get("checkpoint", "") is not None:  # probe_regions may do without
            yield prefix + name, block
            if name == "zeroshot_qwen":
                yield "probe_vlm", block


def line_of(params: Params, name: str, block: dict) -> list[str]:
    """Return a stage's line of the table."""
    try:
        cost = estimate(params, name, block)
    except CheckpointError as error:
        print(f"{name}: {error}", file=sys.stderr)
        cost = None
    if cost is None:
        return [name, *["?"] * (2 + len(CARDS))]
    needs = (cost.needs(cost.batch) + cost.images) / GIB
    cells = [describe(cost, card) for card in CARDS]
    return [name, f"{cost.fixed / GIB:.1f}", f"{needs:.1f}", *cells]


def describe(cost: Cost, card: Card) -> str:
    """Return the time of a stage on `card`, and the images at a time if the batch does not fit."""
    at_once = cost.fits(card)
    if not at_once:
        return "no"
    minutes = cost.seconds(card, at_once) / 60
    time = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{max(1, round(minutes))} min"
    return time if at_once == cost.batch else f"{time} ({at_once})"


# --- Stages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A model without weights; ``run(n)`` is its forward pass for n images.

    Each image is answered by ``passes`` of it, by writing ``tokens``, with a pass each, and by
    ``more`` operations that `run` leaves out; in training by one pass, and by ``more_training``.
    """

    model: nn.Module
    run: Callable[[int], torch.Tensor]
    passes: int = 1
    tokens: int = 0
    more: float = 0.0
    more_training: float = 0.0


def estimate(params: Params, name: str, block: dict) -> Cost | None:
    """Return what the stage of a `block` of params.yaml takes; None for a stage not in WORKS."""
    stage = name.partition(".")[0]
    if stage not in WORKS:
        return None
    precision = params.content[params.profile]["precision"]
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.bfloat16)
    work = WORKS[stage](block, dtype)
    epochs, at_once = block.get("epochs", 0), block.get("micro_batch") or block["batch_size"]
    one, batch = (measure(work, n, epochs > 0, dtype) for n in (1, at_once))
    slope = (batch.peak - one.peak) / max(1, at_once - 1)

    total = count_images(params)
    images = total * (1.0 if block.get("images") == "all" else SHARES[stage])
    operations, answered = work.more * images, work.passes * images
    trained = total * epochs * (FILMS if stage == "segment_lungs" else TRAIN)
    if block.get("epoch_steps"):
        trained = epochs * block["epoch_steps"] * block["batch_size"]
    if epochs:  # a third of a step is its forward pass; validation is half of what is answered
        operations += work.more_training * trained
        answered = trained + (answered + total * epochs * SHARES[stage] / 2) / 3
    weights = [*work.model.parameters()]
    moments = 8 * sum(x.numel() for x in weights if x.requires_grad) if epochs else 0
    return Cost(
        fixed=sum(x.nbytes for x in weights) + moments,
        images=total * block["image_size"] ** 2,
        batch=at_once,
        active=lambda n: one.peak + slope * (n - 1),
        operations=operations + batch.operations * answered / at_once,
        calls=batch.calls * (answered + work.tokens * images) / at_once,
    )


def count_images(params: Params) -> int:
    """Return how many images the profile expects; raises ParameterError if it does not say."""
    key = f"{params.profile}.expected_counts"
    counts = params.content[params.profile]["expected_counts"]
    if not counts:
        raise ParameterError(
            f"{key}: null, so say how many to plan for: -S '{key}={{normal: 999}}'"
        )
    return sum(counts.values())


def image_model(block: dict, dtype: torch.dtype) -> Work:
    """Return the image encoder that a block of params.yaml names."""
    side, pooling = block["image_size"], block.get("pooling", "mean")
    source, kind = find_checkpoint(block["checkpoint"], block["revision"]), weights_type(dtype)
    with FakeTensorMode(), no_init_weights():
        model = load_classifier(source, side, kind, pooling, random=True)
    return Work(model, lambda n: model(pixel_values=torch.empty(n, 3, side, side).to(kind)).logits)


def regions(block: dict, dtype: torch.dtype) -> Work:
    """Return an image encoder that sees each image in each of its regions."""
    work = image_model(block, dtype)
    return replace(work, passes=REGIONS)


def image_and_text(block: dict, dtype: torch.dtype) -> Work:
    """Return both towers of SigLIP, of which the texts are few where they do not train."""
    side, kind = block["image_size"], weights_type(dtype)
    source = find_checkpoint(block["checkpoint"], block["revision"])
    config = source.load_config(SiglipConfig)
    with FakeTensorMode(), no_init_weights():
        model = SiglipModel._from_config(config, dtype=kind)

    def run(n: int) -> torch.Tensor:
        pixels = torch.empty(n, 3, side, side).to(kind)
        if "epochs" not in block:
            return model.get_image_features(pixels).pooler_output
        tokens = torch.zeros(n, TEXT_LENGTH, dtype=torch.int64)
        return model(input_ids=tokens, pixel_values=pixels).logits_per_image

    return Work(model, run)


def unet(block: dict, dtype: torch.dtype) -> Work:
    """Return the U-Net that finds lungs."""
    side, kind = block["image_size"], weights_type(dtype)
    place = SimpleNamespace(device="cpu", float_type=kind)
    model = make_segmenter(place, UNetConfig(image_size=side, channels=block["channels"])).model
    empty(model, FakeTensorMode())
    return Work(model, lambda n: model(torch.empty(n, 1, side, side).to(kind)))


def asking(block: dict, dtype: torch.dtype) -> Work:
    """Return a vision-language model that is asked with all controls."""
    return language_model(block, dtype, QUESTIONS, PICTURES)


def probing(block: dict, dtype: torch.dtype) -> Work:
    """Return a vision-language model that is asked once."""
    return language_model(block, dtype)


def annotating(block: dict, dtype: torch.dtype) -> Work:
    """Return a vision-language model that is asked once, and writes token by token."""
    return language_model(block, dtype, pictures=PICTURES, tokens=block["max_new_tokens"])


def language_model(
    block: dict, dtype: torch.dtype, passes: int = 1, pictures: int = 1, tokens: int = 0
) -> Work:
    """Return the vision-language model of a block, with adapters if it trains.

    Its vision tower multiplies each weight once for each patch of a picture.
    """
    source = find_checkpoint(block["checkpoint"], block["revision"])
    config = source.load(AutoConfig.from_pretrained)
    if config.model_type not in FAMILIES:
        raise source.error(f"its model_type is {config.model_type}")
    with FakeTensorMode(), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    if "lora" in block:
        add_adapters(model, block)
    family, vision, side = FAMILIES[config.model_type], config.vision_config, block["image_size"]
    patches = (getattr(vision, "image_size", side) // vision.patch_size) ** 2
    length = family.image_tokens(config, side) + TEXT_TOKENS
    sees = block.get("lora", {}).get("vision", "none") != "none"

    def run(n: int) -> torch.Tensor:
        size = config.get_text_config().hidden_size
        inputs = torch.empty(n, length, size, dtype=dtype, requires_grad=sees)
        hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        return model.lm_head(hidden[:, -ANSWER_TOKENS:]).float().log_softmax(-1)

    weights = [
        sum(x.numel() for x in part.parameters())
        for part in (model.get_submodule(family.vision.rstrip(".")), model.model.language_model)
    ]
    seeing, writing = 2 * patches * weights[0], 2 * weights[1] * tokens
    more, more_training = pictures * seeing + writing, seeing * (3 if sees else 1)
    return Work(model, run, passes, tokens, more, more_training)


def add_adapters(model: nn.Module, block: dict) -> None:
    """Add the adapters of a block to `model`, as finetune_qwen does."""
    settings = LoraSettings(**block["lora"])
    family = FAMILIES[model.config.model_type]
    vlm = SimpleNamespace(model=model, config=model.config, family=family)
    names = target_modules(vlm, settings)
    config, mode = LoraConfig(r=settings.rank, target_modules=names), model.lm_head.weight.fake_mode
    with warnings.catch_warnings():  # peft asks transformers by a name that will go
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(model, config, low_cpu_mem_usage=True)
    empty(model, mode)
    if block["checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})


def empty(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace weights of `model` that have content, or no place, by such that have none."""
    for module in model.modules():
        for name, x in [*module.named_parameters(recurse=False)]:
            if not isinstance(x.data, FakeTensor):
                with mode:
                    new = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
                setattr(module, name, nn.Parameter(new, x.requires_grad))


def weights_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type of weights that train, or are an encoder's: fp32 if precision is mixed."""
    return torch.float32 if dtype in MIXED.values() else dtype


WORKS: dict[str, Callable[[dict, torch.dtype], Work]] = {
    "segment_lungs": unet,
    "probe_regions": regions,
    "zeroshot_qwen": asking,
    "probe_vlm": probing,
    "zeroshot_vlm": asking,
    "zeroshot_siglip": image_and_text,
    "annotate": annotating,
    "finetune_siglip_text": image_and_text,
    "finetune_qwen": asking,
    "finetune_siglip": image_model,
    "finetune_cnn": image_model,
    "extract_features": image_model,
    "audit_synthetic": image_model,
}
# Of the images, which are answered.
SHARES = dict.fromkeys(WORKS, TEST) | {"segment_lungs": FILMS}
SHARES |= dict.fromkeys(("probe_regions", "probe_vlm", "annotate", "extract_features"), 1.0)


@dataclass(frozen=True)
class Measured:
    """A batch: the bytes beside the weights at their peak, its operations and operators."""

    peak: int
    operations: int
    calls: int


def measure(work: Work, n: int, training: bool, dtype: torch.dtype = torch.bfloat16) -> Measured:
    """Return what a forward pass of n images takes, with the backward pass if `training`."""
    counter, memory = FlopCounterMode(display=False), Memory(work.model.parameters())
    work.model.train(training)
    with next(work.model.parameters()).fake_mode, memory, counter:
        precision = torch.autocast("cpu", torch.bfloat16, enabled=dtype in MIXED.values())
        with nullcontext() if training else torch.no_grad(), precision:
            outputs = work.run(n)
        if training:
            outputs.float().sum().backward()
    work.model.zero_grad()
    return Measured(memory.peak, counter.get_total_flops(), memory.calls)


if __name__ == "__main__":
    run_tool(main)
