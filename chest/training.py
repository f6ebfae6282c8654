"""Fine-tuning of an image classifier: sampler, optimizer, schedule, epochs, and how it goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from chest.augment import change, draw_changes
from chest.calibration import negative_log_likelihood
from chest.compute import Normalization, device_name
from chest.dataset import Dataset
from chest.errors import ChestError, ParameterError
from chest.labels import LABELS
from chest.metrics import classification_metrics
from chest.params import FinetuneSiglip
from chest.predictions import CURVE_COLUMNS
from chest.progress import progress
from chest.resident import Images
from chest.resume import States
from chest.running import Interrupted, deferring_signals
from chest.siglip import Input, classify, classify_rows

MAX_GRADIENT_NORM = 1.0  # the usual guard of transformers against a single bad batch
VALUES = ("epoch", "step", "rate", "curve", "best", "best_epoch")  # of a Run, as json holds them


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
    """AdamW, fused; weight decay on matrices and kernels, not on biases, norms, other vectors."""
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
        fused=True,
    )


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where; ``images`` are those of ``data``."""

    accelerator: Accelerator
    model: nn.Module
    data: Dataset
    images: Images
    normal: Normalization
    settings: FinetuneSiglip


@dataclass
class Run:
    """How far a training is: with the model's weights all that the rest of it depends on.

    ``sampler`` draws batches and augmentation; ``drew`` is its state when the epoch began. ``step``
    steps of ``epoch`` (from 1) are done, with ``losses``, float32 (steps of an epoch,), over the
    batches of all processes, the last at the learning rate ``rate``. ``best`` is the highest (UAR,
    -loss) on the validation split so far, reached in ``best_epoch`` with the weights ``kept``.
    While a step or the end of an epoch changes it, it is not ``whole``, and nothing to be kept.
    """

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sampler: torch.Generator
    drew: torch.Tensor
    losses: torch.Tensor
    epoch: int = 1
    step: int = 0
    rate: float = 0.0
    curve: list[dict] = field(default_factory=list)
    best: tuple[float, float] = (-1.0, 0.0)
    best_epoch: int = 0
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = True

    @property
    def done(self) -> int:
        """How many steps are done in all."""
        return (self.epoch - 1) * len(self.losses) + self.step


def train(
    task: Task, seed: int, log: Callable[[dict], None], states: States | None = None
) -> tuple[pd.DataFrame, int]:
    """Fine-tune the model in place on the training split; it ends with its best epoch's weights.

    The best epoch is that of the highest validation UAR; among equals that of the lowest validation
    loss. `log` gets each row of the curve as it is known, on the main process. With `states` the
    training goes on from what is kept there, and keeps itself there every `save_every` steps, when
    it is done, and where a signal ends it.

    Returns the curve (CURVE_COLUMNS, one row an epoch, counted from 1; the learning rate is that of
    the epoch's last step) and the best epoch. Raises ParameterError where the plan cannot be
    followed, or a batch does not fit into memory, and Interrupted where a signal ends it.
    """
    accelerator, model, settings = task.accelerator, task.model, task.settings
    rows = task.data.rows("train")
    plan = make_plan(settings, len(rows), accelerator.num_processes)
    weights = sampling_weights(task.data.table.iloc[rows], settings.balance)
    run = begin(task, plan, seed)
    if states is not None:
        restore(task, run, states)
    if settings.compile != "none":
        model.compile(mode=settings.compile)
    parallel, optimizer = accelerator.prepare(model, run.optimizer)

    kept = (run.epoch, run.step, run.done)

    def save() -> str:
        nonlocal kept
        now = (run.epoch, run.step, run.done)
        if states is not None and accelerator.is_main_process and now != kept:
            keep(task, run, states)
        kept = now
        return told()

    def told() -> str:
        if not kept[-1]:
            return "no step of the training was kept: the next run begins it anew"
        return f"the next run goes on after step {kept[-1]} of {plan.total}"

    if accelerator.is_main_process and run.done:
        print(f"Going on after step {run.done} of {plan.total}")
        for row in run.curve:
            log(row)
    try:
        while run.epoch <= plan.epochs:
            run.sampler.set_state(run.drew)
            drawn = rows[draw_epoch(weights, len(rows), plan, settings.batch_size, run.sampler)]
            train_epoch(task, run, parallel, optimizer, drawn, save)
            score = validate(task)
            with deferring_signals():
                finish_epoch(task, run, score)
                if run.epoch > plan.epochs:
                    save()
            if accelerator.is_main_process:
                log(run.curve[-1])
    except Interrupted as end:
        with deferring_signals():
            raise Interrupted(end.signal, save() if run.whole else told()) from None
    model.load_state_dict(run.kept)
    return pd.DataFrame(run.curve)[list(CURVE_COLUMNS)], run.best_epoch


def begin(task: Task, plan: Plan, seed: int) -> Run:
    """A training of which nothing is done."""
    optimizer = make_optimizer(task.model, task.settings)
    schedule = get_cosine_schedule_with_warmup(optimizer, plan.warmup, plan.total)
    sampler = torch.Generator().manual_seed(seed)  # the same in every process
    losses = torch.zeros(plan.steps, device=task.accelerator.device)
    return Run(optimizer, schedule, sampler, sampler.get_state(), losses)


def train_epoch(
    task: Task,
    run: Run,
    parallel: nn.Module,
    optimizer,
    drawn: np.ndarray,
    save: Callable[[], str],
) -> None:
    """The epoch's optimizer steps that are not done: one for each batch of rows in `drawn`.

    `drawn` is int64 (steps, batch size); `parallel` and `optimizer` are as accelerate prepared
    them. Each process takes its part of each batch; the gradients are those of the whole batch. No
    step waits for the device: images, targets and augmentation are there before the first one.
    `save` keeps the state, and returns what to say of it.
    """
    accelerator, settings = task.accelerator, task.settings
    device, main = accelerator.device, accelerator.is_main_process
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    mine = drawn[:, share]
    targets = torch.from_numpy(task.data.targets()[mine]).to(device)
    adjustment = logit_adjustment(
        task.data.targets()[task.data.rows("train")], settings.balance
    ).to(device)
    changes = draw_epoch_changes(settings, drawn.shape, run.sampler)
    changes = None if changes is None else changes[:, share].to(device)
    left = range(run.step, len(drawn))
    parallel.train()
    with deferring_signals() as asked, refusing_large_batches(task, asked):
        batches = task.images.stream(list(mine[run.step :]))
        for i, images in zip(left, progress(batches, "steps", len(left), not main), strict=True):
            run.whole = False
            augment = None if changes is None else partial(change, changes=changes[i])
            logits = classify(accelerator, parallel, images, task.normal, augment)
            loss = functional.cross_entropy(logits + adjustment, targets[i])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parallel.parameters(), MAX_GRADIENT_NORM)
            run.rate = run.schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            run.schedule.step()
            run.losses[i] = accelerator.reduce(loss.detach(), "mean")
            run.step = i + 1
            run.whole = True
            # The others follow the main process: where it ends, their exchange with it fails.
            if main and asked():
                raise Interrupted(asked(), save())
            if run.done % settings.save_every == 0:
                save()


def draw_epoch_changes(
    settings: FinetuneSiglip, shape: tuple[int, int], sampler: torch.Generator
) -> torch.Tensor | None:
    """The augmentation of an epoch's images, float32 (steps, batch size, 5); None without any."""
    if settings.augment is None:
        return None
    steps, size = shape
    return torch.stack([draw_changes(settings.augment, size, sampler) for _ in range(steps)])


@contextmanager
def refusing_large_batches(task: Task, asked: Callable[[], int]) -> Iterator[None]:
    """Turn what a batch too large raises into a ParameterError."""
    try:
        yield
    except RuntimeError as error:
        if asked() and not task.accelerator.is_main_process:  # which has left
            raise Interrupted(asked()) from None
        if not should_reduce_batch_size(error):
            raise
        raise ParameterError(
            f"finetune_siglip.batch_size: {task.settings.batch_size} images do not fit into the"
            f" memory of {device_name(task.accelerator)}: lower it, or launch more processes"
        ) from None


def finish_epoch(task: Task, run: Run, score: dict[str, float]) -> None:
    """Note the epoch's row of the curve and, if it is the best, its weights; begin the next."""
    loss = run.losses.mean().item()
    if not np.isfinite([loss, score["val_loss"]]).all():
        raise ParameterError(
            f"finetune_siglip.lr: {task.settings.lr}, but the loss is no number in epoch"
            f" {run.epoch}: lower it"
        )
    run.whole = False
    run.curve.append({"epoch": run.epoch, "train_loss": loss, "learning_rate": run.rate, **score})
    if (score["val_uar"], -score["val_loss"]) > run.best:
        run.best, run.best_epoch = (score["val_uar"], -score["val_loss"]), run.epoch
        run.kept = {name: x.detach().cpu().clone() for name, x in task.model.state_dict().items()}
    run.drew = run.sampler.get_state()
    run.epoch, run.step = run.epoch + 1, 0
    run.whole = True


# --- Going on after an end -------------------------------------------------------------------


def keep(task: Task, run: Run, states: States) -> None:
    """Keep the training's state, which is the same in every process."""
    states.save(run.done, *state_of(task, run))


def state_of(task: Task, run: Run) -> tuple[dict[str, torch.Tensor], dict]:
    """The training's state: tensors by name, and values that json can hold."""
    optimizer = run.optimizer.state_dict()
    tensors = {f"model.{name}": x for name, x in task.model.state_dict().items()}
    tensors |= {f"kept.{name}": x for name, x in run.kept.items()}
    tensors |= {
        f"optimizer.{i}.{name}": x
        for i, own in optimizer["state"].items()
        for name, x in own.items()
    }
    tensors |= {"sampler": run.drew, "losses": run.losses, "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state(task.accelerator.device)
    values = {name: getattr(run, name) for name in VALUES}
    values["schedule"] = run.schedule.state_dict()
    values["groups"] = [
        {name: x for name, x in group.items() if name != "params"}
        for group in optimizer["param_groups"]
    ]
    return tensors, values


def restore(task: Task, run: Run, states: States) -> None:
    """Bring `run` and the model to the newest state that is kept; leave them where none is."""
    tensors, values = state_of(task, run)
    before = {name: x.clone() for name, x in tensors.items()}, values

    def try_to(*state) -> None:
        try:
            take_up(task, run, *state)
        except Exception:
            take_up(task, run, *before)  # nothing is taken up by half
            raise

    # The main process sets aside what is damaged before the others look.
    with task.accelerator.main_process_first():
        states.load(try_to)
    reached = task.accelerator.gather(torch.tensor([run.done], device=task.accelerator.device))
    if reached.min() != reached.max():
        raise ChestError(f"{states.folder}: processes see different states; it must be shared")


def take_up(task: Task, run: Run, tensors: dict[str, torch.Tensor], values: dict) -> None:
    """Bring `run` and the model to what `keep` kept."""
    parts: dict[str, dict] = {"model": {}, "kept": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    task.model.load_state_dict(parts["model"])
    run.kept = parts["kept"]
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {}
    for name, tensor in parts["optimizer"].items():
        i, _, key = name.partition(".")
        optimizer["state"].setdefault(int(i), {})[key] = tensor
    for group, stored in zip(optimizer["param_groups"], values["groups"], strict=True):
        group.update(stored)
    run.optimizer.load_state_dict(optimizer)
    run.schedule.load_state_dict(values["schedule"])
    run.losses.copy_(tensors["losses"])
    run.drew = tensors["sampler"]
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"], task.accelerator.device)
    for name in VALUES:
        setattr(run, name, values[name])
    run.best = tuple(run.best)


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
    return classify_rows(task.accelerator, task.model, Input(task.images, rows, task.normal), size)
