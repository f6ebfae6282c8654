"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685) of a vision-language model, by peft.

A folder of a trained model holds ``adapter_model.safetensors`` with its configuration, the head if
there is one, and ``answering.json``: the checkpoint that they adapt, and how it is asked.
"""

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from chest.core.errors import ChestError, ParameterError
from chest.core.files import write_json
from chest.core.labels import LABELS
from chest.core.params import Positive, Section, Text
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import saving
from chest.models.vlm.asking import Asker, AskingSettings, VlmPrompts
from chest.models.vlm.model import Vlm, load_vlm

LANGUAGE = "model.language_model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD, ANSWERING = "head.safetensors", "answering.json"


class LoraSettings(Section):
    """The adapters: for ``params.yaml``, which documents each setting."""

    rank: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    language: Annotated[list[Literal["attention", "mlp"]], Field(min_length=1, max_length=2)]
    vision: Literal["none", "merger", "lora"]


class Answering(Section):
    """``answering.json``: what a trained adapter adapts, and how it was trained to be asked."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    method: Literal["words", "head"]
    temperature: Annotated[float, Field(gt=0)]
    prompts: VlmPrompts


def add_adapters(vlm: Vlm, settings: LoraSettings, seed: int) -> PeftModel:
    """Add adapters to the layers of `vlm` that `settings` name; nothing else trains.

    The model answers as before until it is trained. With bf16 weights the adapters are fp32, since
    bf16 would lose small updates.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # A pattern: peft would save a list in random order.
        target_modules="|".join(map(re.escape, target_modules(vlm, settings))),
    )
    with silent():
        adapted = get_peft_model(vlm.model, config)
    rng = np.random.default_rng(seed)
    for name, weights in adapted.named_parameters():
        if "lora_A" in name:  # as peft draws them, but the same on every machine
            fill_uniform(weights, rng)
    return adapted


def silent() -> warnings.catch_warnings:
    """Silence peft, which asks transformers by a name that will go."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


@torch.no_grad()
def fill_uniform(weights: torch.Tensor, rng: np.random.Generator) -> None:
    """Fill `weights`, (outputs, inputs), from -1 / sqrt(inputs) to 1 / sqrt(inputs)."""
    limit = weights.shape[1] ** -0.5
    weights.copy_(torch.from_numpy(rng.uniform(-limit, limit, weights.shape)))


def target_modules(vlm: Vlm, settings: LoraSettings) -> list[str]:
    """Return the names of the linear layers that get an adapter."""
    parts = {"attention": ATTENTION, "mlp": MLP}
    ends = tuple(f".{end}" for part in settings.language for end in parts[part])
    linear = [name for name, x in vlm.model.named_modules() if isinstance(x, nn.Linear)]
    found = [name for name in linear if name.startswith(LANGUAGE) and name.endswith(ends)]
    if settings.vision == "none":
        return found
    family = vlm.family
    prefixes = family.merger if settings.vision == "merger" else (family.vision, *family.merger)
    vision = [x for x in linear if x.startswith(prefixes) and not x.startswith(family.idle)]
    if not vision:
        kind = vlm.config.model_type
        raise ParameterError(f"lora.vision: {settings.vision}, but {kind} has no layer there")
    return found + vision


def make_head(vlm: Vlm, seed: int) -> nn.Linear:
    """Return a new linear layer from a token's hidden state to the classes."""
    size = vlm.config.text_config.hidden_size
    dtype = torch.promote_types(vlm.model.dtype, torch.float32)
    head = nn.Linear(size, len(LABELS), device=vlm.model.device, dtype=dtype)
    fill_uniform(head.weight, np.random.default_rng([seed, 1]))
    nn.init.zeros_(head.bias)
    return head


def describe_trainable(model: nn.Module) -> str:
    """Return the names of the parameters that train, with how many layers have them."""
    names = [name for name, weights in model.named_parameters() if weights.requires_grad]
    names = [re.sub(r"\.\d+\.", ".*.", name).removesuffix(".default.weight") for name in names]
    return "; ".join(f"{name} ({count})" for name, count in Counter(names).items())


# --- Saving and loading ----------------------------------------------------------------------


def save_adapter(
    folder: Path, adapted: PeftModel, head: nn.Linear | None, answering: Answering
) -> None:
    """Write adapters (safetensors), head and answering.json into `folder`."""
    with saving(folder):
        adapted.save_pretrained(folder)
        if head is not None:
            save_file(
                {name: x.contiguous() for name, x in head.state_dict().items()}, folder / HEAD
            )
    write_json(folder / ANSWERING, answering.model_dump())


def load_adapter(
    accelerator: Accelerator, folder: Path, batch_size: int
) -> tuple[Asker, Answering]:
    """Load what `save_adapter` wrote, onto the checkpoint that it adapts.

    Raises ChestError if the folder is missing or damaged, CheckpointError for its checkpoint.
    """
    try:
        answering = Answering.model_validate_json((folder / ANSWERING).read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ChestError(f"{folder}: no adapter there ({reason}); train it: dvc repro") from None
    source = find_checkpoint(answering.checkpoint, answering.revision)
    vlm = load_vlm(accelerator, source, answering.image_size)
    own = find_checkpoint(str(folder), "main")
    with own.reading("adapter", RuntimeError, TypeError), silent():
        PeftModel.from_pretrained(vlm.model, str(folder)).eval()
        head = None
        if answering.method == "head":
            head = make_head(vlm, 0)
            head.load_state_dict(load_file(folder / HEAD))
    settings = AskingSettings(method="likelihood", max_new_tokens=1, prior="none")
    return Asker(accelerator, vlm, answering.prompts, settings, batch_size, head), answering
