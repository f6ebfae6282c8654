"""The training loop: optimizer steps, validation, saving and resuming."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from chest.core.errors import ParameterError
from chest.core.labels import LABELS
from chest.core.parallel import progress
from chest.core.runtime import deferred_interrupts
from chest.data.dataset import Dataset
from chest.models.common.classification import ImageRows, classify, classify_rows
from chest.models.common.device import device_name, float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import Normalization
from chest.training.augmentation import change, draw_changes
from chest.training.calibration import negative_log_likelihood
from chest.training.checkpointing import States
from chest.training.sampling import draw_epoch, logit_adjustment, sampling_weights
from chest.training.selection import best_epoch, validation_figures
from chest.training.settings import TrainingSettings

MAX_GRADIENT_NORM = 1.0  # the default of transformers; limits the damage of a bad batch


@dataclass(frozen=True)
class Task:
    """A model, its data, device and settings. ``key`` names the settings in error messages."""

    key: str
    settings: TrainingSettings
    accelerator: Accelerator
    model: PreTrainedModel  # for image classification, with LABELS
    data: Dataset
    images: ImageStore
    normalization: Normalization

    @cached_property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.data.rows("train")) // self.settings.batch_size)

    @property
    def total(self) -> int:
        """Optimizer steps in the whole training."""
        return self.steps * self.settings.epochs


@dataclass
class TrainingState:
    """All that the rest of a training depends on, the same in every process.

    ``epoch`` epochs are finished, with a row each in ``curve``, and ``step`` steps of the next one,
    with their ``losses``, (steps of an epoch,). ``best_weights``: those of the best epoch so far.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    losses: torch.Tensor
    epoch: int = 0
    step: int = 0
    curve: list[dict] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: int = 0  # `done` of the newest state on disk

    @property
    def done(self) -> int:
        """Finished steps of all epochs."""
        return self.epoch * len(self.losses) + self.step

    def state_dict(self) -> dict:
        """Return what `load_state_dict` restores, including the random number generators."""
        device = self.losses.device
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.epoch, self.step, self.curve],
            "losses": self.losses,
            "best_weights": self.best_weights,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved training state."""
        self.model.load_state_dict(state["model"])
        parameters = {int(i): x for i, x in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": parameters})
        self.epoch, self.step, self.curve = state["progress"]
        self.losses.copy_(state["losses"])
        self.best_weights = state["best_weights"]
        self.saved = self.done
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.losses.device)


def train(
    task: Task, seed: int, states: States, log: Callable[[dict], None]
) -> tuple[pd.DataFrame, int]:
    """Train the model, which is on its device, and load the weights of the best epoch.

    Training resumes from the newest of `states`. A state is saved every ``save_every`` steps, at
    the end, and on Ctrl-C or SIGTERM, before KeyboardInterrupt is raised. `log` is called with each
    row of the curve.

    Returns the curve (epoch, from 1, train_loss, val_loss, learning_rate of the epoch's last step,
    val_uar, val_war, val_within, val_worst) and the best epoch. Raises ParameterError for
    impossible settings, a batch that does not fit into memory, and a loss that is not finite.
    """
    check_schedule(task)
    state = begin(task, states)
    for row in state.curve:
        log(row)
    if task.settings.compile != "none":
        task.model.compile(mode=task.settings.compile)
    try:
        with deferred_interrupts() as interrupted:
            run_epochs(task, seed, state, states, log, interrupted)
    except KeyboardInterrupt as interrupt:
        if task.accelerator.is_main_process:
            interrupt.add_note(f"Resumes after step {state.saved} of {task.total}.")
        raise
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise ParameterError(
            f"{task.key}.batch_size: {task.settings.batch_size} images do not fit into the memory"
            f" of {device_name(task.accelerator)}; lower it or launch more processes"
        ) from None
    task.model.load_state_dict(state.best_weights)
    return pd.DataFrame(state.curve), best_epoch(state.curve, task.settings.select_by)


def check_schedule(task: Task) -> None:
    """Raise ParameterError if warm-up or batch size do not fit the training or the processes."""
    settings, processes = task.settings, task.accelerator.num_processes
    if settings.warmup_steps > task.total:
        raise ParameterError(
            f"{task.key}.warmup_steps: {settings.warmup_steps}, but the training has {task.total}"
            f" steps ({settings.epochs} epochs of {task.steps}); lower it or raise epochs"
        )
    if settings.batch_size % processes:
        raise ParameterError(
            f"{task.key}.batch_size: {settings.batch_size} is not divisible by the {processes}"
            " processes"
        )


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and kernels, but not on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [decayed, others], lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )


def learning_rate(task: Task, step: int) -> float:
    """Return the learning rate of `step`, from 0: linear warm-up, then cosine decay to 0."""
    warmup = task.settings.warmup_steps
    if step < warmup:
        return task.settings.lr * step / warmup
    share = (step - warmup) / (task.total - warmup)
    return task.settings.lr * (1 + math.cos(math.pi * share)) / 2


def begin(task: Task, states: States) -> TrainingState:
    """Return the newest state on disk, read by the main process, or the initial state."""
    accelerator = task.accelerator
    losses = torch.zeros(task.steps, device=accelerator.device, dtype=float_type(accelerator))
    state = TrainingState(task.model, make_optimizer(task.model, task.settings), losses)
    found = states.load() if accelerator.is_main_process else None
    [found] = broadcast_object_list([found])
    if found is not None:
        state.load_state_dict(found)
        accelerator.print(f"Resuming after step {state.done} of {task.total}")
    return state


def run_epochs(
    task: Task,
    seed: int,
    state: TrainingState,
    states: States,
    log: Callable[[dict], None],
    interrupted: Callable[[], bool],
) -> None:
    """Train the remaining epochs; if interrupted, save the state and return."""
    main, settings = task.accelerator.is_main_process, task.settings

    def save() -> None:
        if main:
            states.save(state.done, state.state_dict())
            state.saved = state.done

    parallel, optimizer = task.accelerator.prepare(task.model, state.optimizer)
    while state.epoch < settings.epochs:
        rng = np.random.default_rng([seed, state.epoch])
        for _ in train_epoch(task, state, parallel, optimizer, rng):
            leave = main and interrupted()  # the launcher then ends the other processes
            if leave or state.done % settings.save_every == 0:
                save()
            if leave:
                return
        finish_epoch(task, state)
        log(state.curve[-1])
    save()


def train_epoch(
    task: Task,
    state: TrainingState,
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> Iterator[None]:
    """Train the remaining steps of an epoch; yield after each.

    `parallel` and `optimizer` were prepared by accelerate. Each process takes its share of a batch;
    gradients are averaged. No step waits for the device: rows, targets and augmentation are copied
    there before the first one.
    """
    accelerator, settings = task.accelerator, task.settings
    device, dtype = accelerator.device, float_type(accelerator)
    batches, changes = draw_share(task, rng)
    all_targets = task.data.targets()
    targets = torch.from_numpy(all_targets[batches]).to(device)
    adjustment = logit_adjustment(all_targets[task.data.rows("train")], settings.balance)
    adjustment = adjustment.to(device, dtype)
    left = range(state.step, task.steps)
    shown = progress(left, "steps", len(left), silent=not accelerator.is_main_process)
    parallel.train()
    for i, images in zip(shown, task.images.stream(list(batches[state.step :])), strict=True):
        augment = None if changes is None else partial(change, changes=changes[i])
        logits = classify(accelerator, parallel, images, task.normalization, augment)
        loss = cross_entropy(logits + adjustment, targets[i])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parallel.parameters(), MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task, state.done)
        optimizer.step()
        optimizer.zero_grad()
        state.losses[i] = accelerator.reduce(loss.detach(), "mean")
        state.step = i + 1
        yield


def draw_share(task: Task, rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor | None]:
    """Draw the batches and augmentation of an epoch, and return this process's share of each batch.

    Returns rows, int64 (steps, B), and changes on the device, (steps, B, 5), or None.
    """
    accelerator, settings = task.accelerator, task.settings
    rows = task.data.rows("train")
    weights = sampling_weights(task.data.table.iloc[rows], settings.balance)
    drawn = rows[draw_epoch(len(rows), weights, settings.batch_size, rng)]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    if settings.augment is None:
        return drawn[:, share], None
    changes = draw_changes(settings.augment, drawn.shape, rng)[:, share]
    return drawn[:, share], changes.to(accelerator.device, float_type(accelerator))


def finish_epoch(task: Task, state: TrainingState) -> None:
    """Validate, add a row to the curve, and keep the weights of the best epoch so far."""
    epoch, loss = state.epoch + 1, state.losses.mean().item()
    rows = task.data.rows("val")
    logits = predict(task, rows)
    val_loss = negative_log_likelihood(logits, task.data.targets()[rows])
    if not math.isfinite(loss + val_loss):
        raise ParameterError(
            f"{task.key}.lr: {task.settings.lr}, but the loss of epoch {epoch} is not finite;"
            " lower it"
        )
    predicted = np.array(LABELS)[logits.argmax(axis=1)]
    row = {"epoch": epoch, "train_loss": loss, "val_loss": val_loss}
    row["learning_rate"] = learning_rate(task, state.done - 1)
    state.curve.append(row | validation_figures(task.data.table.iloc[rows], predicted))
    if best_epoch(state.curve, task.settings.select_by) == epoch:
        weights = task.model.state_dict()
        state.best_weights = {name: x.detach().cpu().clone() for name, x in weights.items()}
    state.epoch, state.step = epoch, 0


def predict(task: Task, rows: np.ndarray) -> np.ndarray:
    """Return the logits of `rows`, float64 (n, 3), in evaluation mode."""
    # Twice the training batch: no gradients are kept.
    batch_size = 2 * task.settings.batch_size
    images = ImageRows(task.images, rows, task.normalization)
    return classify_rows(task.accelerator, task.model, images, batch_size)
