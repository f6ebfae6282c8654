"""Fine-tuning of a vision-language model: it learns to give the answers that it is scored by."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.nn.functional import nll_loss

from chest.core.files import replacing, write_table
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import Params, Positive
from chest.core.runtime import interrupt_note
from chest.data.dataset import read_dataset
from chest.evaluation import predictions
from chest.evaluation.controls import write_answers
from chest.evaluation.predictions import Record
from chest.models.common.checkpoints import Source, find_checkpoint
from chest.models.common.device import Precision, describe_run, start
from chest.models.common.fingerprint import fingerprint
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.preprocessing import describe_preprocessing, write_preprocessing
from chest.models.common.view_masks import read_view_masks
from chest.models.vlm.adapter import (
    Answering,
    LoraSettings,
    add_adapters,
    describe_trainable,
    make_head,
    save_adapter,
)
from chest.models.vlm.asking import (
    AskedRows,
    Asker,
    AskingSettings,
    VlmPrompts,
    asked,
)
from chest.models.vlm.controls import Replies, ask_with_controls
from chest.models.vlm.likelihood import encode
from chest.models.vlm.model import load_vlm
from chest.models.vlm.zeroshot import describe_asking
from chest.training.augmentation import change
from chest.training.calibration import fit_temperature
from chest.training.checkpointing import States
from chest.training.classification import ClassifierSettings, Selection
from chest.training.finetuning import ANSWERED, MODELS, live_log
from chest.training.loop import Batch, Task, train
from chest.training.sampling import logit_adjustment, sampling_weights


class VlmTrainingSettings(ClassifierSettings):
    """A block of params.yaml, which documents each setting."""

    method: Literal["words", "head"]
    loss: Literal["classes", "answer"]
    lora: LoraSettings
    checkpointing: bool
    inference_batch: Positive


class Reader(nn.Module):
    """A model as the training loop calls it: images in, log-likelihoods of the classes out.

    Images of each modality are asked with their own question; the tokens before the image are read
    again each time, since the weights that read them change.
    """

    def __init__(self, asker: Asker):
        super().__init__()
        self.asker = asker
        self.network, self.head = asker.vlm.model, asker.head
        prompts = asker.prompts
        texts = [prompts.ask(modality, prompts.question) for modality in MODALITIES]
        self.questions = [asker.prepare(text, share=False) for text in texts]

    def forward(
        self, images: torch.Tensor, modalities: torch.Tensor, changes: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the log-likelihoods, (B, 3), of uint8 grey `images`, (B, side, side).

        `modalities` are positions in MODALITIES, (B,); `changes` the augmentation of each image.
        """
        dtype = torch.promote_types(self.network.dtype, torch.float32)
        result = torch.zeros(len(images), len(LABELS), device=images.device, dtype=dtype)
        for number, question in enumerate(self.questions):
            own = torch.nonzero(modalities == number)[:, 0]
            if len(own):
                augment = None if changes is None else partial(change, changes=changes[own])
                seen = encode(self.asker.vlm, images[own], augment)
                result = result.index_add(0, own, self.asker.score(seen, question).to(dtype))
        return result


@dataclass(frozen=True)
class AnswerObjective(Selection):
    """The likelihood of the right answer, among those of the classes or among all texts."""

    settings: VlmTrainingSettings
    reader: Reader
    images: ImageStore

    def predict(self, rows: np.ndarray) -> np.ndarray:
        about = AskedRows(self.images, rows, self.data.table["modality"].to_numpy()[rows])
        return self.reader.asker.ask(about, [asked(self.reader.asker.prompts)])[:, 0]

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of `batch`."""
        likelihoods = model(batch.images, self.modalities[batch.rows], batch.changes)
        if self.settings.loss == "classes":
            likelihoods = (likelihoods + self.adjustment).log_softmax(1)
        return nll_loss(likelihoods, self.targets[batch.rows])

    @cached_property
    def targets(self) -> torch.Tensor:
        return self._on_device(self.data.targets())

    @cached_property
    def modalities(self) -> torch.Tensor:
        return self._on_device(self.data.modalities())

    @cached_property
    def adjustment(self) -> torch.Tensor:
        targets = self.data.targets()[self.data.rows("train")]
        return self._on_device(logit_adjustment(targets, self.settings.balance))

    def _on_device(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        return torch.tensor(np.asarray(values), device=self.reader.network.device)


def finetune_vlm(system: str, block: str, name: str, params: Params) -> None:
    """Train the adapters of a vision-language model, and answer validation, test and external.

    The settings are the `block` of the profile in params.yaml; `system` names the files, `name` is
    what tables and charts show. Writes the adapters, the curve, the predictions and the controls.
    """
    settings = params.system(block, VlmTrainingSettings)
    data = read_dataset("train", "val", "test", side=settings.image_size)
    accelerator = start(params.seed, params.system("precision", Precision))
    source = find_checkpoint(settings.checkpoint, settings.revision)
    prompts = params.section("prompts.vlm", VlmPrompts)
    masks, accepted = read_view_masks(data.table, settings.image_size, settings.view, params.seed)
    images = place_images(data.images, accelerator.device, masks, settings.view)
    reader, adapted = load_reader(accelerator, source, prompts, settings, params.seed)
    rows = data.rows("train")
    rows = rows[accepted[rows]]
    objective = AnswerObjective(settings, data, reader, images)
    task = Task(
        key=f"{params.profile}.{block}",
        settings=settings,
        accelerator=accelerator,
        model=reader,
        images=images,
        rows=rows,
        weights=sampling_weights(data.table.iloc[rows], settings.balance),
        objective=objective,
    )
    parameters = settings.model_dump(exclude={"save_every", "micro_batch"})
    parameters |= {"seed": params.seed, "prompts": prompts.model_dump()}
    states = States(system, fingerprint(accelerator, source, settings.image_size, parameters))

    curve, best_epoch = train(task, params.seed, states, live_log(accelerator))
    with interrupt_note("The training is saved: the next run resumes with the calibration."):
        reader.eval()
        temperature = calibrate(objective)
        answered = data.rows(*ANSWERED)
        replies = ask_with_controls(reader.asker, images, data, answered)
        details = {
            "trained_on": len(rows),
            "best_epoch": best_epoch,
            "select_by": settings.select_by,
            "temperature": round(temperature, 4),
            "trainable": describe_trainable(reader),
            **describe_asking(reader.asker),
            "method": settings.method,
            **describe_preprocessing(
                params, settings.image_size, reader.asker.vlm.normalization, settings.view
            ),
        }
        if accelerator.is_main_process:
            run = describe_run(accelerator, source, reader.network, params.seed)
            record = Record(name=name, kind="trained", n=len(answered), **run, details=details)
            answering = Answering(
                checkpoint=settings.checkpoint,
                revision=source.commit or settings.revision,
                image_size=settings.image_size,
                method=settings.method,
                temperature=temperature,
                prompts=prompts,
            )
            with replacing(MODELS / system) as folder:
                folder.mkdir()
                save_adapter(folder, adapted, reader.head, answering)
                write_preprocessing(folder, params, settings.view)
            write_table(predictions.CURVES / f"{system}.csv", curve, float_format="%.6g")
            tables = tabulate(replies, temperature, accepted[answered])
            write_answers(system, data.table.iloc[answered], tables, record)
            states.clear()
    accelerator.end_training()


def load_reader(
    accelerator: Accelerator,
    source: Source,
    prompts: VlmPrompts,
    settings: VlmTrainingSettings,
    seed: int,
) -> tuple[Reader, PeftModel]:
    """Load the checkpoint with new adapters, and a new head if there is one."""
    vlm = load_vlm(accelerator, source, settings.image_size)
    adapted = add_adapters(vlm, settings.lora, seed)
    head = make_head(vlm, seed) if settings.method == "head" else None
    if settings.checkpointing:
        vlm.model.activation_checkpointing_enable({"use_reentrant": False})
    asking = AskingSettings(method="likelihood", max_new_tokens=1, prior="none")
    asker = Asker(accelerator, vlm, prompts, asking, settings.inference_batch, head)
    return Reader(asker).to(accelerator.device), adapted


def calibrate(objective: AnswerObjective) -> float:
    """Return the temperature that fits the validation split, by which likelihoods are divided."""
    if objective.settings.calibrate == "none":
        return 1.0
    rows = objective.data.rows("val")
    return fit_temperature(objective.predict(rows), objective.data.targets()[rows])


def tabulate(replies: Replies, temperature: float, accepted: np.ndarray) -> dict:
    """Tabulate `replies` at a temperature; images that are not `accepted`, bool (n,), have none."""
    scaled = {name: own / temperature for name, own in replies.decisive.items()}
    tables = replace(replies, decisive=scaled).tabulate()
    return {
        name: ([x if seen else None for x, seen in zip(answers, accepted, strict=True)], covered)
        for name, (answers, covered) in tables.items()
    }
