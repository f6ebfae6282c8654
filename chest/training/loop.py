"""The training loop: optimizer steps, validation, saving and resuming.

What is trained is up to the `Objective`: a classifier, a segmentation network, a language model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from chest.core.errors import ParameterError
from chest.core.parallel import progress
from chest.core.runtime import deferred_interrupts
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.common.memory import describe_memory, is_out_of_memory
from chest.training.augmentation import draw_changes
from chest.training.checkpointing import States
from chest.training.sampling import draw_epoch
from chest.training.settings import LoopSettings

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

MAX_GRADIENT_NORM = 1.0  # the default of transformers; limits the damage of a bad batch


@dataclass(frozen=True)
class Batch:
    """Images to train on, all on the device.

    ``images``: uint8 (B, side, side). ``rows``: their row numbers, int64 (B,). ``changes``: the
    augmentation of each, (B, K), for `augmentation.change`; None for none. ``progress``: the share
    of the training that is done, from 0 to 1, and ``step`` the finished optimizer steps.
    """

    images: torch.Tensor
    rows: torch.Tensor
    changes: torch.Tensor | None
    progress: float
    step: int = 0


class Objective(Protocol):
    """What a training minimises, and how its epochs are compared."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch; `model`, maybe a DDP wrapper, is to be called once."""

    def validate(self) -> dict[str, float]:
        """Return the figures of the validation split; ``val_loss`` is one of them."""

    def best_epoch(self, curve: list[dict]) -> int:
        """Return the epoch to keep, from the rows of the curve so far."""


@dataclass(frozen=True)
class Task:
    """A model in training. ``key`` names the settings in error messages.

    ``rows``: the training images among ``images``, int64 (n,). ``weights``: the probability of
    drawing each, float64 (n,); None draws each equally often. ``average``: a moving average of the
    parameters, which then is what is validated and kept.
    """

    key: str
    settings: LoopSettings
    accelerator: Accelerator
    model: nn.Module
    images: ImageStore
    rows: np.ndarray
    weights: np.ndarray | None
    objective: Objective
    average: "EMAModel | None" = None

    @cached_property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return self.settings.epoch_steps or -(-len(self.rows) // self.settings.batch_size)

    @property
    def total(self) -> int:
        """Optimizer steps in the whole training."""
        return self.steps * self.settings.epochs


@dataclass
class TrainingState:
    """All that the rest of a training depends on, the same in every process.

    ``epoch`` epochs are finished, with a row each in ``curve``, and ``step`` steps of the next one,
    with their ``losses``, (steps of an epoch,). ``best_weights``: those of the best epoch so far.
    ``scaler`` scales the gradients in fp16.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: torch.Tensor
    scaler: torch.amp.GradScaler | None = None
    average: "EMAModel | None" = None
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
            "model": trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "average": self.average and self.average.state_dict(),
            "progress": [self.epoch, self.step, self.curve],
            "losses": self.losses,
            "best_weights": self.best_weights,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved training state."""
        self.model.load_state_dict(state["model"], strict=False)
        parameters = {int(i): x for i, x in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": parameters})
        for parameter, own in self.optimizer.state.items():
            for name, x in own.items():
                if x.shape == parameter.shape:  # the fused optimizer wants their order in memory
                    own[name] = torch.empty_like(parameter).copy_(x)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
            self.average.to(self.losses.device)
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

    Returns the curve (epoch, from 1, train_loss, learning_rate of the epoch's last step, and the
    objective's validation figures) and the best epoch. Raises ParameterError for
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
        if not is_out_of_memory(error):
            raise
        at_once = task.settings.micro_batch or task.settings.batch_size
        raise ParameterError(
            f"{task.key}.micro_batch: {at_once} images at a time do not fit: {describe_memory()};"
            " lower it, which leaves batch_size as it is, or launch more processes"
        ) from None
    task.model.load_state_dict(state.best_weights, strict=False)
    return pd.DataFrame(state.curve), task.objective.best_epoch(state.curve)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that train and the buffers: frozen weights are in the checkpoint."""
    parameters = model.named_parameters(remove_duplicate=False)  # tied weights have two names
    frozen = {name for name, x in parameters if not x.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}


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


def make_optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and kernels, but not on biases and norms.

    A parameter with an attribute ``lr_scale`` learns at that multiple of the learning rate.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = parameter.ndim > 1, getattr(parameter, "lr_scale", 1.0)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "lr_scale": scale,
            }
            for (decayed, scale), parameters in groups.items()
        ],
        lr=settings.lr,
        fused=True,
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
    optimizer = make_optimizer(task.model, task.settings)
    state = TrainingState(task.model, optimizer, losses, accelerator.scaler, task.average)
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
    gradients are averaged. The loop does not wait for the device: rows and augmentation are copied
    there before the first step.
    """
    accelerator = task.accelerator
    batches, changes = draw_share(task, rng)
    set_training_mode(parallel)
    rows = torch.from_numpy(batches).to(accelerator.device)
    left = range(state.step, task.steps)
    shown = progress(left, "steps", len(left), silent=not accelerator.is_main_process)
    for i, images in zip(shown, task.images.stream(list(batches[state.step :])), strict=True):
        own = None if changes is None else changes[i]
        batch = Batch(images, rows[i], own, state.done / task.total, state.done)
        loss = train_step(task, parallel, batch)
        accelerator.clip_grad_norm_(parallel.parameters(), MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task, state.done) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        if task.average:
            task.average.step(task.model.parameters())
        state.losses[i] = accelerator.reduce(loss, "mean")
        state.step = i + 1
        yield


def set_training_mode(model: nn.Module) -> None:
    """Switch `model` to training, but keep the statistics of its batch norms.

    Those of balanced batches would not be those of the images to classify, and each process would
    have its own: see `batch_norm.estimate`.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def train_step(task: Task, parallel: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the gradients of a batch, at most ``micro_batch`` images at a time.

    Returns the loss, detached. Gradients are exchanged between processes once.
    """
    size, accelerator = len(batch.images), task.accelerator
    micro = task.settings.micro_batch or size
    total = torch.zeros((), device=accelerator.device, dtype=float_type(accelerator))
    for start in range(0, size, micro):
        part = slice(start, start + micro)
        changes = None if batch.changes is None else batch.changes[part]
        images, rows = batch.images[part], batch.rows[part]
        own = Batch(images, rows, changes, batch.progress, batch.step)
        last = start + micro >= size
        with nullcontext() if last else accelerator.no_sync(parallel):
            loss = task.objective.loss(parallel, own) * (len(own.images) / size)
            accelerator.backward(loss)
        total += loss.detach()
    return total


def draw_share(task: Task, rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor | None]:
    """Draw the batches and augmentation of an epoch, and return this process's share of each batch.

    Returns rows, int64 (steps, B), and changes on the device, (steps, B, K), or None.
    """
    accelerator, settings = task.accelerator, task.settings
    shape = (task.steps, settings.batch_size)
    drawn = task.rows[draw_epoch(len(task.rows), task.weights, shape, rng)]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    if settings.augment is None:
        return drawn[:, share], None
    changes = draw_changes(settings.augment, drawn.shape, rng)[:, share]
    return drawn[:, share], changes.to(accelerator.device, float_type(accelerator))


def finish_epoch(task: Task, state: TrainingState) -> None:
    """Validate, add a row to the curve, and keep the weights of the best epoch so far."""
    epoch, loss = state.epoch + 1, state.losses.mean().item()
    task.model.eval()
    with averaged(task):
        figures = task.objective.validate()
        if not math.isfinite(loss + figures["val_loss"]):
            raise ParameterError(
                f"{task.key}.lr: {task.settings.lr}, but the loss of epoch {epoch} is not finite;"
                " lower it"
            )
        row = {"epoch": epoch, "train_loss": loss, "val_loss": figures["val_loss"]}
        row["learning_rate"] = learning_rate(task, state.done - 1)
        state.curve.append(row | figures)
        if task.objective.best_epoch(state.curve) == epoch:
            weights = trainable_state(task.model)
            state.best_weights = {name: x.detach().cpu().clone() for name, x in weights.items()}
    state.epoch, state.step = epoch, 0


@contextmanager
def averaged(task: Task) -> Iterator[None]:
    """Give the model the moving average of its parameters, if there is one, in this block."""
    if task.average is None:
        yield
        return
    parameters = [*task.model.parameters()]
    task.average.store(parameters)
    task.average.copy_to(parameters)
    try:
        yield
    finally:
        task.average.restore(parameters)
