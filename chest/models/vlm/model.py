"""A loaded vision-language model: its prompt and its images."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.nn.functional import interpolate
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from chest.core.errors import printable
from chest.models.common.checkpoints import Source
from chest.models.common.device import frozen_type
from chest.models.common.pixels import (
    PREPROCESSOR,
    Normalization,
    Transform,
    load_normalization,
    to_pixels,
)
from chest.models.vlm.families import FAMILIES, Family

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # numbers of PIL's filters


@dataclass(frozen=True)
class Vlm:
    """A vision-language model with its tokenizer and chat template.

    Images are resized to ``side`` px with the filter ``resample``, as the checkpoint's own
    processor would resize them, and become ``image_tokens`` tokens.
    """

    source: Source
    family: Family
    model: PreTrainedModel
    tokenizer: object
    chat_template: str
    normalization: Normalization
    side: int
    resample: str

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def image_tokens(self) -> int:
        return self.family.image_tokens(self.config, self.side)


def load_vlm(accelerator: Accelerator, source: Source, side: int) -> Vlm:
    """Load a checkpoint of one of FAMILIES for inference on images of `side` px.

    With bf16 precision its weights are bf16. Raises CheckpointError for another kind of checkpoint,
    before weights are fetched.
    """
    kind = source.load_dict(PreTrainedConfig.get_config_dict).get("model_type")
    if kind not in FAMILIES:
        raise source.error(f"its model_type is {printable(kind)}, expected {' or '.join(FAMILIES)}")
    family = FAMILIES[kind]
    config = source.load_config(family.config)
    normalization = load_normalization(source)
    processor = source.load(family.processor.from_pretrained, PREPROCESSOR)
    tokenizer = source.load_tokenizer()
    template = _load_chat_template(source, tokenizer)
    model = source.load_model(
        family.model,
        config=config,
        dtype=frozen_type(accelerator),
        device_map=accelerator.device,
    ).eval()
    vlm = Vlm(
        *(source, family, model, tokenizer, template, normalization),
        side=family.side(processor, side),
        resample=RESAMPLE[processor.resample],
    )
    # The checkpoint's own settings sample, and penalize words that the question contains.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[end_of_turn(vlm), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return vlm


def _load_chat_template(source: Source, tokenizer) -> str:
    """Load the processor's template; the tokenizer's own may have no place for images.

    The processor itself is not loaded, since its video part needs torchvision.
    """
    processor = source.load_dict(ProcessorMixin.get_processor_dict, "chat template")
    template = processor.get("chat_template") or tokenizer.chat_template
    if not isinstance(template, str):
        raise source.error("it has no chat template, or several")
    return template


# --- Prompt ----------------------------------------------------------------------------------


def prompt_ids(vlm: Vlm, question: str, image: bool = True) -> list[int]:
    """Return the token ids of the prompt: one image, `question`, and the start of the answer.

    Without `image`, the same without its place.
    """
    text = _render(vlm, _ask(question, image))
    written, read = vlm.family.place_image(vlm.tokenizer, vlm.config, vlm.image_tokens)
    if text.count(written) != image:
        found = text.count(written)
        raise vlm.source.error(f"its chat template has {found} places for {int(image)} image")
    return _tokenize(vlm, text.replace(written, read))


def end_of_turn(vlm: Vlm) -> int:
    """Return the token that the chat template puts after an answer."""
    messages, answer = _ask("?", True), "normal"
    prompt = _render(vlm, messages)
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    text = _render(vlm, [*messages, said], add_generation_prompt=False)
    if not text.startswith(prompt + answer) or text == prompt + answer:
        raise vlm.source.error("its chat template does not put an answer behind its prompt")
    return _tokenize(vlm, text.removeprefix(prompt + answer))[0]


def _ask(question: str, image: bool) -> list[dict]:
    content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _render(vlm: Vlm, messages: list[dict], add_generation_prompt: bool = True) -> str:
    with vlm.source.reading("chat template"):
        return vlm.tokenizer.apply_chat_template(
            messages,
            chat_template=vlm.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )


def _tokenize(vlm: Vlm, text: str) -> list[int]:
    return vlm.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- Images ----------------------------------------------------------------------------------


def image_inputs(
    vlm: Vlm, images: torch.Tensor, transform: Transform | None = None
) -> dict[str, torch.Tensor]:
    """Return the vision tower's inputs for uint8 grey `images`, (B, side, side), on the device.

    `transform` may change the images first, as in to_pixels.
    """

    def prepare(grey: torch.Tensor) -> torch.Tensor:
        grey = grey if transform is None else transform(grey)
        return grey if grey.shape[-1] == vlm.side else _resize(grey, vlm.side, vlm.resample)

    # Not normalized in bf16, which cannot tell all 256 grey values apart.
    dtype = torch.promote_types(vlm.model.dtype, torch.float32)
    return vlm.family.cut(vlm.config, to_pixels(images, vlm.normalization, prepare, dtype))


def _resize(grey: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """Resize `grey`, (B, 1, rows, columns), as PIL does: columns, then rows, in whole levels."""
    for size in ((grey.shape[-2], side), (side, side)):
        grey = interpolate(grey, size, mode=mode, align_corners=False, antialias=True)
        # Halves are rounded up, also where the product is a little less.
        grey = (grey * 255 + 0.5001).floor().clamp(0, 255) / 255
    return grey
