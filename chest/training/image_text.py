"""Fine-tuning of SigLIP by its own loss: images and texts of a class find each other.

Each pair of an image and a text in a batch is told apart by a sigmoid (Zhai et al. 2023,
arXiv:2303.15343). A text is a prompt of the image's class and modality, maybe with what a
vision-language model wrote of the image. It fits every image of its class and modality: in a batch
of three classes most pairs of one class would otherwise be called wrong. Images are classified by
the prompts alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from accelerate import Accelerator
from scipy.special import softmax
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from chest.core.files import replacing, write_json, write_table
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Params
from chest.core.runtime import interrupt_note
from chest.data.annotations import read_annotations
from chest.data.dataset import Dataset, read_dataset
from chest.evaluation import predictions
from chest.evaluation.predictions import Record, tabulate
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.device import Precision, describe_run, float_type, saving, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.pixels import (
    Normalization,
    check_image_size,
    load_normalization,
    to_pixels,
    write_preprocessor,
)
from chest.models.common.preprocessing import describe_preprocessing, write_preprocessing
from chest.models.common.view_masks import read_view_masks
from chest.models.siglip import (
    PROMPTS,
    TEXT_LENGTH,
    PromptClassifier,
    SiglipPrompts,
    compare_rows,
    embed_classes,
    tokenize_prompts,
)
from chest.models.vlm.annotation import AnnotationPrompts
from chest.training.augmentation import change
from chest.training.calibration import fit_temperature
from chest.training.checkpointing import States
from chest.training.classification import ClassifierSettings, Selection
from chest.training.finetuning import ANSWERED, MODELS, live_log
from chest.training.loop import Batch, Task, train
from chest.training.sampling import sampling_weights

BLOCK = "finetune_siglip_text"


class ImageTextSettings(ClassifierSettings):
    """The block ``finetune_siglip_text`` of a profile in params.yaml, which documents it."""


class Matcher(nn.Module):
    """SigLIP as the training loop calls it: the logits of all pairs of images and texts."""

    def __init__(self, siglip: SiglipModel):
        super().__init__()
        self.siglip = siglip

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, (B, T), of pixels (B, 3, side, side) and tokens, int64 (T, 64)."""
        return self.siglip(input_ids=tokens, pixel_values=pixels).logits_per_image


@dataclass(frozen=True)
class Texts:
    """Token ids of the training texts: ``tokens``, int64 (T, 64).

    The texts of image i are the rows of `of_image`, int64 (N, prompts of a class).
    """

    tokens: torch.Tensor
    of_image: torch.Tensor


@dataclass(frozen=True)
class ImageText(Selection):
    """The mean sigmoid loss of all pairs of a batch; classification by prompts."""

    settings: ImageTextSettings
    accelerator: Accelerator
    siglip: SiglipModel
    images: ImageStore
    normalization: Normalization
    prompts: list[list[torch.Tensor]]  # tokens by MODALITIES and LABELS
    texts: Texts

    def predict(self, rows: np.ndarray) -> np.ndarray:
        classes = embed_classes(self.siglip, self.prompts)
        classifier = PromptClassifier(self.siglip, classes, self.normalization)
        told = self.data.table["modality"].to_numpy()[rows]
        size = 2 * self.settings.batch_size
        found = compare_rows(self.accelerator, classifier, self.images, rows, told, size)
        return np.log(np.maximum(found, np.finfo(np.float64).tiny))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of all pairs of `batch`.

        Each image brings one of its texts, another one in each of its turns.
        """
        dtype = float_type(self.accelerator)
        augment = None if batch.changes is None else partial(change, changes=batch.changes)
        pixels = to_pixels(batch.images, self.normalization, augment, dtype)
        turn = torch.arange(len(batch.rows), device=batch.rows.device)
        choices = self.texts.of_image[batch.rows]
        tokens = self.texts.tokens[choices[turn, (turn + batch.rows) % choices.shape[1]]]
        with self.accelerator.autocast():
            logits = model(pixels, tokens).to(dtype)
        group = self.groups[batch.rows]
        fits = group[:, None] == group[None]
        return -logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()

    @cached_property
    def groups(self) -> torch.Tensor:
        """A number for the class and modality of each image, int64 (N,)."""
        numbers = self.data.targets() * len(MODALITIES) + self.data.modalities()
        return torch.tensor(numbers, device=self.accelerator.device)


def load_siglip(source: Source, image_size: int, dtype: torch.dtype) -> SiglipModel:
    """Load both towers for images of `image_size` px."""
    config = source.load_config(SiglipConfig)
    check_image_size(config.vision_config.image_size, image_size)
    return source.load_model(SiglipModel, config=config, dtype=dtype)


def make_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: SiglipPrompts,
    data: Dataset,
    notes: Sequence[str] | None,
    device: torch.device,
) -> Texts:
    """Return the texts of the training images: each prompt of the class and modality.

    With `notes`, one for each image of `data`, the image's own stands behind the prompt. Texts are
    cut after 64 tokens. Classes with fewer prompts than others repeat them.
    """
    most = max(len(getattr(prompts, label)) for label in LABELS)
    texts: dict[str, int] = {}
    of_image = np.zeros((len(data.table), most), np.int64)
    for row in data.rows("train"):
        image = data.table.iloc[row]
        own = prompts.of(image["label"], image["modality"])
        note = f". {notes[row]}" if notes and notes[row] else ""
        for i in range(most):
            text = (own[i % len(own)] + note).lower()
            of_image[row, i] = texts.setdefault(text, len(texts))
    padding = {"padding": "max_length", "padding_side": "right", "max_length": TEXT_LENGTH}
    tokens = tokenizer([*texts], truncation=True, return_tensors="pt", **padding)["input_ids"]
    return Texts(tokens.to(device), torch.from_numpy(of_image).to(device))


@torch.no_grad()
def divide_scale(siglip: SiglipModel, temperature: float) -> None:
    """Divide the scale of the similarities, so that the model is saved calibrated."""
    siglip.logit_scale -= math.log(temperature)


def finetune_image_text(system: str, name: str, params: Params, notes: bool) -> None:
    """Train both towers, and answer validation, test and external images by prompts.

    `system` names the files, `name` is what tables and charts show. With `notes` the texts hold the
    descriptions of data/annotations.csv. Writes the model, the curve and the predictions.
    """
    settings = params.system(BLOCK, ImageTextSettings)
    prompts = params.section("prompts.siglip", SiglipPrompts)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    tokenizer = source.load_tokenizer()
    masks, accepted = read_view_masks(data.table, settings.image_size, settings.view, params.seed)
    images = place_images(data.images, accelerator.device, masks, settings.view)
    siglip = load_siglip(source, settings.image_size, float_type(accelerator))
    siglip.to(accelerator.device)
    descriptions, made = None, {}
    if notes:
        findings = params.section("prompts.annotations", AnnotationPrompts).findings
        _, descriptions, made = read_annotations(data.table, [*findings])
    objective = ImageText(
        *(settings, data, accelerator, siglip, images, load_normalization(source)),
        prompts=tokenize_prompts(source, tokenizer, prompts),
        texts=make_texts(tokenizer, prompts, data, descriptions, accelerator.device),
    )
    rows = data.rows("train")
    rows = rows[accepted[rows]]
    task = Task(
        key=f"{params.profile}.{BLOCK}",
        settings=settings,
        accelerator=accelerator,
        model=Matcher(siglip),
        images=images,
        rows=rows,
        weights=sampling_weights(data.table.iloc[rows], settings.balance),
        objective=objective,
    )
    parameters = settings.model_dump(exclude={"save_every"})
    parameters |= {"seed": params.seed, "prompts": prompts.model_dump(), "notes": descriptions}
    states = States(system, fingerprint(accelerator, source, settings.image_size, parameters))

    curve, best_epoch = train(task, params.seed, states, live_log(accelerator))
    with interrupt_note("The training is saved: the next run resumes with the calibration."):
        temperature = 1.0
        if settings.calibrate == "temperature":
            val = data.rows("val")
            temperature = fit_temperature(objective.predict(val), data.targets()[val])
            divide_scale(siglip, temperature)
        answered = data.rows(*ANSWERED)
        shares = softmax(objective.predict(answered), axis=1)
        answers = [x if seen else None for x, seen in zip(shares, accepted[answered], strict=True)]
        if accelerator.is_main_process:
            details = {
                "trained_on": len(rows),
                "best_epoch": best_epoch,
                "select_by": settings.select_by,
                "temperature": round(temperature, 4),
                **({"annotated_by": made["checkpoint"]} if notes else {}),
                **describe_preprocessing(
                    params, settings.image_size, objective.normalization, settings.view
                ),
            }
            run = describe_run(accelerator, source, siglip, params.seed)
            record = Record(name=name, kind="trained", n=len(answered), **run, details=details)
            with replacing(MODELS / system) as folder:
                with saving(folder):
                    siglip.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_json(folder / PROMPTS, prompts.model_dump())
                write_preprocessor(folder, objective.normalization, settings.image_size)
                write_preprocessing(folder, params, settings.view)
            write_table(predictions.CURVES / f"{system}.csv", curve, float_format="%.6g")
            predictions.write(system, tabulate(data.table.iloc[answered], answers), record)
            states.clear()
    accelerator.end_training()
