"""Fine-tuning of an image classifier: sampler, optimizer, schedule, epochs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from chest.augment import change, draw_changes
from chest.calibration import negative_log_likelihood
from chest.compute import Normalization
from chest.dataset import Dataset
from chest.errors import ParameterError
from chest.labels import LABELS
from chest.metrics import classification_metrics
from chest.params import FinetuneSiglip
from chest.predictions import CURVE_COLUMNS
from chest.progress import progress
from chest.siglip import classify, classify_rows

MAX_GRADIENT_NORM = 1.0  # the usual guard of transformers against a single bad batch


@dataclass(frozen=True)
class Plan:
    """How long training is: ``steps`` optimizer steps in each of ``epochs``."""

    steps: int
    epochs: int
    warmup: int

    @property
    def total(self) -> int:
        return self.steps * self.epochs


def make_plan(settings: FinetuneSiglip, images: int, processes: int) -> Plan:
    """The plan for `images` training images; raises ParameterError where it cannot be followed."""
    plan = Plan(-(-images // settings.batch_size), settings.epochs, settings.warmup_steps)
    if plan.warmup > plan.total:
        raise ParameterError(
            f"finetune_siglip.warmup_steps: {plan.warmup}, but the whole training has only"
            f" {plan.total} steps ({plan.epochs} epochs of {plan.steps}): the learning rate would"
            " never be reached; lower warmup_steps, or raise epochs"
        )
    if settings.batch_size % processes:
        raise ParameterError(
            f"finetune_siglip.batch_size: {settings.batch_size} images cannot be dealt evenly to"
            f" {processes} processes"
        )
    return plan


def sampling_weights(table: pd.DataFrame, balance: str) -> torch.Tensor | None:
    """How often each row of the training `table` should be drawn, float64 (n,); None: all alike.

    ``class`` makes the classes equally frequent, ``class_modality`` the classes of each modality
    that has them (COVID-19 CT, normal CT, normal X-ray, tuberculosis X-ray).
    """
    if balance not in ("class", "class_modality"):
        return None
    group = table["label"] if balance == "class" else table["label"] + "/" + table["modality"]
    return torch.from_numpy(1.0 / group.groupby(group).transform("size").to_numpy(np.float64))


def logit_adjustment(targets: np.ndarray, balance: str) -> torch.Tensor:
    """What is added to the logits in the training loss alone, float32 (3,).

    With ``logit_adjusted`` the logarithm of each class's share of the training images, so that the
    logits themselves minimise the balanced error (Menon et al. 2021, arXiv:2007.07314, with tau 1);
    a class that has no image counts as one. Else zeros.
    """
    if balance != "logit_adjusted":
        return torch.zeros(len(LABELS))
    counts = np.maximum(np.bincount(targets, minlength=len(LABELS)), 1)
    return torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32)


def draw_epoch(
    weights: torch.Tensor | None, images: int, plan: Plan, batch_size: int, generator
) -> np.ndarray:
    """Which training images make up each batch of an epoch, int64 (steps, batch_size).

    With `weights` they are drawn with replacement, else each image comes once, and the last batch
    is filled up from the front.
    """
    count = plan.steps * batch_size
    if weights is not None:
        drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    else:
        order = torch.randperm(images, generator=generator)
        drawn = order.repeat(-(-count // images))[:count]
    return drawn.numpy().reshape(plan.steps, batch_size)


def make_optimizer(model: nn.Module, settings: FinetuneSiglip) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels, not on biases, norms and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
    )


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where."""

    accelerator: Accelerator
    model: nn.Module
    data: Dataset
    normal: Normalization
    settings: FinetuneSiglip


def train(task: Task, seed: int, log: Callable[[dict], None]) -> tuple[pd.DataFrame, int]:
    """Fine-tune the model in place on the training split; it ends with its best epoch's weights.

    The best epoch is that of the highest validation UAR; among equals that of the lowest validation
    loss. `log` gets each row of the curve as it is known, on the main process.

    Returns the curve (CURVE_COLUMNS, one row an epoch, counted from 1; the learning rate is that of
    the epoch's last step) and the best epoch. Raises ParameterError where the plan cannot be
    followed.
    """
    accelerator, model, settings = task.accelerator, task.model, task.settings
    rows = task.data.rows("train")
    plan = make_plan(settings, len(rows), accelerator.num_processes)
    weights = sampling_weights(task.data.table.iloc[rows], settings.balance)
    adjustment = logit_adjustment(task.data.targets()[rows], settings.balance)
    generator = torch.Generator().manual_seed(seed)  # the same in every process
    optimizer = make_optimizer(model, settings)
    schedule = get_cosine_schedule_with_warmup(optimizer, plan.warmup, plan.total)
    parallel, optimizer = accelerator.prepare(model, optimizer)
    curve, best, kept = [], None, {}
    for epoch in range(1, plan.epochs + 1):
        drawn = rows[draw_epoch(weights, len(rows), plan, settings.batch_size, generator)]
        losses = train_epoch(task, parallel, optimizer, schedule, drawn, adjustment, generator)
        curve.append({"epoch": epoch, **losses, **validate(task)})
        score = (curve[-1]["val_uar"], -curve[-1]["val_loss"])
        if best is None or score > best[0]:
            best = (score, epoch)
            kept = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        if accelerator.is_main_process:
            log(curve[-1])
    model.load_state_dict(kept)
    return pd.DataFrame(curve)[list(CURVE_COLUMNS)], best[1]


def train_epoch(
    task: Task,
    parallel: nn.Module,
    optimizer,
    schedule,
    drawn: np.ndarray,
    adjustment: torch.Tensor,
    generator: torch.Generator,
) -> dict:
    """One optimizer step for each batch of rows in `drawn`, (steps, batch size).

    `parallel` is the model as accelerate prepared it; `adjustment`, (3,), is added to its logits in
    the loss; `generator` draws the augmentation. Each process takes its part of each batch; the
    gradients are those of the whole batch. Returns the mean loss and the last learning rate.
    """
    accelerator, augment = task.accelerator, task.settings.augment
    targets = torch.tensor(task.data.targets(), device=accelerator.device)
    adjustment = adjustment.to(accelerator.device)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    parallel.train()
    losses, rate = [], 0.0
    silent = not accelerator.is_main_process
    for batch in progress(drawn, "steps", len(drawn), silent):
        rate = schedule.get_last_lr()[0]
        mine, augmented = batch[share], None
        if augment is not None:
            changes = draw_changes(augment, len(batch), generator)[share].to(accelerator.device)
            augmented = partial(change, changes=changes)
        logits = classify(accelerator, parallel, task.data.images[mine], task.normal, augmented)
        loss = functional.cross_entropy(logits + adjustment, targets[mine])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parallel.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
    return {"train_loss": mean.item(), "learning_rate": rate}


def validate(task: Task) -> dict[str, float]:
    """Loss, UAR and WAR on the validation split as it is, without balancing."""
    rows = task.data.rows("val")
    logits = predict(task, rows)
    actual = task.data.targets()[rows]
    names = np.array(LABELS, dtype=object)
    metrics = classification_metrics(names[actual], names[logits.argmax(1)])
    return {
        "val_loss": negative_log_likelihood(logits, actual),
        "val_uar": metrics["uar"],
        "val_war": metrics["war"],
    }


def predict(task: Task, rows: np.ndarray) -> np.ndarray:
    """Logits of the classes, float64 (len(rows), 3), in evaluation mode."""
    # Twice the training batch: no gradients are kept.
    size = 2 * task.settings.batch_size
    return classify_rows(task.accelerator, task.model, task.data.images, rows, task.normal, size)
