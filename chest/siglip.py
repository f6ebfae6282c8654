"""SigLIP (Zhai et al. 2023): zero-shot by prompts, and as an image classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened

import numpy as np
import torch
from accelerate import Accelerator
from transformers import (
    AutoTokenizer,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from chest.answering import answer, in_batches
from chest.compute import (
    CheckpointError,
    Normalization,
    Source,
    check_image_size,
    saving,
    to_pixels,
)
from chest.errors import ParameterError, printable
from chest.files import write_json
from chest.labels import LABELS
from chest.resident import Images
from chest.resume import Journal

TEXT_LENGTH = 64  # tokens: SigLIP was trained on texts padded to this length


@dataclass(frozen=True)
class Input:
    """What is answered: these `rows`, int64 (n,), of the images, normalized so."""

    images: Images
    rows: np.ndarray
    normal: Normalization


def load_for_prompts(source: Source, image_size: int) -> tuple[SiglipModel, object]:
    """Both towers, for inference, and the tokenizer; raises where the image size is another."""
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    if config.text_config.max_position_embeddings != TEXT_LENGTH:
        raise CheckpointError(
            f"checkpoint {source}: it reads texts of {config.text_config.max_position_embeddings}"
            f" tokens, but prompts are padded to {TEXT_LENGTH}"
        )
    model = source.load_model(SiglipModel.from_pretrained, config=config, dtype=torch.float32)
    tokenizer = source.load(AutoTokenizer.from_pretrained, "tokenizer")
    if None in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise source.unfit("its tokenizer has no end token, or none for padding")
    return model.eval(), tokenizer


def load_classifier(source: Source, image_size: int) -> SiglipForImageClassification:
    """The checkpoint's vision tower with a new 3-class head (LABELS) on the mean of its patches.

    The tower's attention pooling is left out: the classifier does not use it.
    """
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    config.vision_config.vision_use_head = False
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: i for i, label in enumerate(LABELS)}
    return source.load_model(
        SiglipForImageClassification.from_pretrained,
        fresh=("classifier.weight", "classifier.bias"),
        spare=("text_model.", "vision_model.head.", "logit_scale", "logit_bias"),
        config=config,
        dtype=torch.float32,
    )


def load_trained(source: Source, image_size: int) -> SiglipForImageClassification:
    """A classifier that `save_classifier` wrote, with its head; raises where it has no such.

    Its classes must be LABELS in their order.
    """
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    if config.id2label != dict(enumerate(LABELS)):
        raise source.unfit(
            f"it is no classifier of {', '.join(LABELS)} (its classes:"
            f" {printable(shortened(config.id2label))})"
        )
    model = source.load_model(
        SiglipForImageClassification.from_pretrained, config=config, dtype=torch.float32
    )
    return model.eval()


def save_classifier(
    model: SiglipForImageClassification, normal: Normalization, folder: Path
) -> None:
    """Write what from_pretrained reads: weights (safetensors), config, preprocessor.

    Raises OSError where there is no room.
    """
    with saving(folder):
        model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    content = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": normal.mean,
        "image_std": normal.std,
    }
    write_json(folder / "preprocessor_config.json", content)


def tokenize(tokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids, int64 (n, 64), padded; raises ParameterError where a prompt is longer.

    Letters are lowered and the padding comes last, as in training. SigLIP's tokenizer does both by
    itself; SigLIP 2's is Gemma's, which lowers no letters and may pad in front. Raises
    CheckpointError where the tokenizer does not end a text with its end token.
    """
    for prompt in prompts:
        ids = tokenizer(prompt.lower())["input_ids"]
        if len(ids) > TEXT_LENGTH:
            raise ParameterError(
                f"prompts.siglip: {prompt!r} has {len(ids)} tokens, at most {TEXT_LENGTH} are read"
            )
        if ids[-1] != tokenizer.eos_token_id:
            raise CheckpointError(
                f"the checkpoint's tokenizer does not end a text with {tokenizer.eos_token}"
            )
    return tokenizer(
        [prompt.lower() for prompt in prompts],
        padding="max_length",
        padding_side="right",
        max_length=TEXT_LENGTH,
        return_tensors="pt",
    )["input_ids"]


@torch.inference_mode()
def class_embeddings(
    model: SiglipModel, tokenizer, prompts: dict[str, Sequence[str]]
) -> torch.Tensor:
    """One unit vector for each class, (3, d): the mean of the unit vectors of its prompts.

    Raises CheckpointError where the tokenizer gives tokens that the model does not know.
    """
    rows = []
    for label in LABELS:
        ids = tokenize(tokenizer, prompts[label])
        if ids.max() >= model.config.text_config.vocab_size:
            raise CheckpointError(
                f"checkpoint {model.name_or_path}: its tokenizer is another model's (token"
                f" {ids.max()}); fetch it again, or name another one"
            )
        texts = _unit(model.get_text_features(ids.to(model.device)).pooler_output)
        rows.append(_unit(texts.mean(0)))
    return torch.stack(rows)


def score(model: SiglipModel, pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Probabilities, float32 (B, 3): softmax over the classes of the scaled cosine similarity.

    SigLIP was trained with a sigmoid for each pair; its bias is the same for all classes, so the
    softmax ranks them as the sigmoids do, and gives numbers that add up to 1.
    """
    features = model.get_image_features(pixels).pooler_output
    # Not in bf16: of a cosine the scale makes a hundredfold difference.
    with torch.autocast(pixels.device.type, enabled=False):
        cosines = _unit(features.float()) @ classes.float().T
        return torch.softmax(cosines * model.logit_scale.float().exp(), -1)


def compare_rows(
    accelerator: Accelerator,
    model: SiglipModel,
    classes: torch.Tensor,
    data: Input,
    batch_size: int,
    journal: Journal | None = None,
) -> list[list[float]]:
    """Probabilities of the classes for each row of `data`, by `score`."""

    def compare(rows: np.ndarray) -> torch.Tensor:
        pixels = to_pixels(data.images.take(rows), data.normal)
        with accelerator.autocast():
            return score(model, pixels, classes)

    answers = answer(accelerator, in_batches(data.rows, batch_size), compare, journal)
    return [answers[row] for row in data.rows.tolist()]


def classify(
    accelerator: Accelerator,
    model,
    images: torch.Tensor,
    normal: Normalization,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits, float32 (B, 3), that a classifier gives uint8 grey `images`, (B, side, side).

    `change` may alter the images first, as in to_pixels.
    """
    pixels = to_pixels(images, normal, change)
    with accelerator.autocast():
        return model(pixel_values=pixels).logits.float()


def classify_rows(
    accelerator: Accelerator,
    model,
    data: Input,
    batch_size: int,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """Logits, float64 (n, 3), of the rows of `data`, in evaluation mode."""
    model.eval()

    def ask(rows: np.ndarray) -> torch.Tensor:
        # A copy: the next batch may be written to the same place (CUDA graphs).
        return classify(accelerator, model, data.images.take(rows), data.normal, change).clone()

    answers = answer(accelerator, in_batches(data.rows, batch_size), ask)
    return np.array([answers[row] for row in data.rows.tolist()])


@torch.no_grad()
def divide_logits(model: SiglipForImageClassification, temperature: float) -> None:
    """Divide all logits that the classifier gives by `temperature`, in its own last layer."""
    model.classifier.weight /= temperature
    model.classifier.bias /= temperature


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
