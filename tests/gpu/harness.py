"""What the cases share: a small study in a folder of its own, stages that are ended, waits.

Imports the stand-in first, which replaces parts of PyTorch.
"""

# ruff: noqa: I001
from stand_in import waits  # before PyTorch is used

import functools
import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from case import draw, write_case
from support import run_stage

from chest.core.params import load_params
from chest.models.common import image_store
from chest.training import finetuning, loop

CASES: dict[str, Callable] = {}


def case_of(function: Callable) -> Callable:
    """Add `function`, which is called with a Patch, to CASES."""
    CASES[function.__name__] = function
    return function


class Patch(pytest.MonkeyPatch):
    """A monkeypatch with the checkpoints and the folder of a case."""

    def __init__(self, folder: Path, checkpoints: Path):
        super().__init__()
        self.folder, self.checkpoints = folder, checkpoints

    def write(self, precision: str, **changes) -> Path:
        """Write a small study with `changes` of finetune_siglip, and enter its folder."""
        self.folder.mkdir()
        write_case(self.folder, self.checkpoints / "siglip", **changes)
        np.save(self.folder / "data/images/56.npy", draw(56).images)
        set_params(self.folder, precision=precision)
        self.chdir(self.folder)
        return self.folder

    def not_resident(self) -> None:
        """Leave the images in their memory map, as if they did not fit on the device."""
        self.setattr(image_store, "_fits", lambda *_: False)


def set_params(folder: Path, **changes) -> None:
    """Set values of the phantom profile, or of its blocks: ``block__key``."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = params["phantom"]
        for parent in parents:
            block = block[parent]
        block[last] = value
    path.write_text(yaml.safe_dump(params))


def set_block(folder: Path, block: str, **changes) -> None:
    """Set values of a block of the phantom profile."""
    set_params(folder, **{f"{block}__{key}": value for key, value in changes.items()})


def record(folder: Path, system: str) -> dict:
    """Return what the record of a system says of the device."""
    return told(folder / f"data/predictions/{system}.json")


def told(path: Path) -> dict:
    """Return what a record says of the device."""
    found = json.loads(path.read_text())
    return {key: found[key] for key in ("device", "precision", "n") if key in found}


# --- Stages that are ended -------------------------------------------------------------------


def resume(
    patch: Patch, stage: Iterable[str], owner: object, name: str, calls: Iterable[int]
) -> dict:
    """Run a `stage` in one go, then again, ended in each of the `calls` of a function.

    `name` of `owner` is that function. Returns the exit codes, how often it was called in all, and
    whether all that was written ends as the same bytes.
    """

    def outputs() -> dict[Path, bytes]:
        written = (path for top in ("data", "models") for path in Path(top).rglob("*"))
        return {path: path.read_bytes() for path in written if path.is_file()}

    run_stage(*stage)
    straight, plain, called = outputs(), getattr(owner, name), []

    @functools.wraps(plain)
    def ended(*arguments):
        called.append(1)
        if len(called) in calls:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    patch.setattr(owner, name, ended)
    codes = []
    for _ in calls:
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as end:
            run_stage(*stage)
        codes.append(end.value.code)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_stage(*stage)
    return {"codes": codes, "calls": len(called), "same": outputs() == straight}


# --- Waits -----------------------------------------------------------------------------------


class NoStates:
    """Training states that are not kept."""

    def load(self) -> None:
        return None


class Captured(Exception):
    """The training that a stage was about to begin."""


def task_of(patch: Patch, *stage: str) -> loop.Task:
    """Return the training of a stage, as the stage makes it."""

    def capture(task: loop.Task, *_):
        raise Captured(task)

    for module in (loop, finetuning):
        patch.setattr(module, "train", capture)
    with pytest.raises(Captured) as captured:
        run_stage(*stage)
    return captured.value.args[0]


def waits_of_training(patch: Patch, *stage: str) -> dict:
    """Count the waits of a step of a stage: those of an epoch less those of one half as long."""
    task = task_of(patch, *stage)
    state = loop.begin(task, NoStates())
    parallel, optimizer = task.accelerator.prepare(task.model, state.optimizer)

    def epoch(begin: int) -> None:
        state.step = begin
        for _ in loop.train_epoch(task, state, parallel, optimizer, np.random.default_rng(0)):
            pass

    epoch(0)  # fills caches
    half = task.steps // 2
    whole, part = (waits(epoch, begin) for begin in (0, half))
    return {"per_step": (whole - part) / half, "per_epoch": whole}


def waits_of_batches(answer: Callable[[np.ndarray], object], batch_size: int) -> dict:
    """Count the waits of a batch: those of `answer` for four batches less those for two."""
    rows = np.arange(4 * batch_size)
    answer(rows)  # fills caches
    whole, half = (waits(answer, part) for part in (rows, rows[: 2 * batch_size]))
    return {"per_batch": (whole - half) / 2}


def load_settings(block: str, kind: type):
    """Return a block of the case's params.yaml, and all parameters."""
    params = load_params()
    return params.system(block, kind), params
