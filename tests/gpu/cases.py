"""Run every stage with a model on a GPU, or on a stand-in for one, and say how each case ended.

    python tests/gpu/cases.py FOLDER            all cases
    python tests/gpu/cases.py FOLDER fp16 ...   some

A process of its own, since the stand-in replaces parts of PyTorch for good. Writes found.json:
for each case what it found, or the traceback of its failure under ``error``.
"""

import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "training", TESTS / "gpu"))

# ruff: noqa: E402, I001
from stand_in import on_device, waits  # before PyTorch is used

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from case import SYSTEM, draw, outputs, settings, task_of, write_case
from support import load_script, run_stage

from chest.models.common import image_store
from chest.models.common.device import start
from chest.training import loop

CASES: dict[str, Callable] = {}


def case_of(function: Callable) -> Callable:
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
        set_params(self.folder, precision=precision)
        self.chdir(self.folder)
        return self.folder


def set_params(folder: Path, **changes) -> None:
    """Set values of the phantom profile, or of its blocks."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = params["phantom"]
        for parent in parents:
            block = block[parent]
        block[last] = value
    path.write_text(yaml.safe_dump(params))


def record(folder: Path, system: str) -> dict:
    found = json.loads((folder / f"data/predictions/{system}.json").read_text())
    return {key: found[key] for key in ("device", "precision", "n")}


# --- Training --------------------------------------------------------------------------------


@case_of
def bf16(patch: Patch) -> dict:
    folder = patch.write("auto")
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def fp16(patch: Patch) -> dict:
    folder = patch.write("fp16")
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def memory_map(patch: Patch) -> dict:
    folder = patch.write("fp32", augment=None)
    patch.setattr(image_store, "_fits", lambda *_: False)
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def adversary(patch: Patch) -> dict:
    folder = patch.write("auto", adversary="modality", micro_batch=4)
    run_stage(SYSTEM)
    return record(folder, SYSTEM)


@case_of
def resumed(patch: Patch) -> dict:
    """In fp16, whose scaler is part of the state: killed after a saved step, and interrupted."""
    folder = patch.write("fp16")
    run_stage(SYSTEM)
    straight, step, calls = outputs(folder), loop.train_step, []

    def ended(*arguments):
        calls.append(1)
        if len(calls) in (6, 12):
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    patch.setattr(loop, "train_step", ended)
    codes = []
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as end:
            run_stage(SYSTEM)
        codes.append(end.value.code)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_stage(SYSTEM)
    return {"codes": codes, "steps": len(calls), "same": outputs(folder) == straight}


def cnn(patch: Patch, family: str) -> dict:
    folder = patch.write("auto")
    chosen = settings(patch.checkpoints / "siglip", batch_norm="estimated").model_dump()
    chosen |= {"checkpoint": str(patch.checkpoints / family)}
    set_params(folder, **{f"finetune_cnn__{family}": chosen})
    run_stage("finetune_cnn", family)
    return record(folder, f"finetune_{family}")


@case_of
def resnet50(patch: Patch) -> dict:
    return cnn(patch, "resnet50")


@case_of
def efficientnet_b0(patch: Patch) -> dict:
    return cnn(patch, "efficientnet_b0")


# --- Inference -------------------------------------------------------------------------------


@case_of
def features(patch: Patch) -> dict:
    folder = patch.write("auto")
    block = {"checkpoint": str(patch.checkpoints / "siglip"), "image_size": 32}
    set_params(folder, **{f"extract_features__siglip__{k}": v for k, v in block.items()})
    run_stage("extract_features", "siglip")
    found = json.loads((folder / "data/features/siglip.json").read_text())
    return {key: found[key] for key in ("device", "precision")}


@case_of
def zeroshot_siglip(patch: Patch) -> dict:
    folder = patch.write("fp16")
    run_stage("zeroshot_siglip")
    return record(folder, "zeroshot_siglip")


def ask(patch: Patch, precision: str, method: str) -> dict:
    folder = patch.write(precision)
    images = np.random.default_rng(0).integers(0, 256, (64, 56, 56), dtype=np.uint8)
    np.save("data/images/56.npy", images)
    block = {"checkpoint": str(patch.checkpoints / "qwen"), "image_size": 56, "method": method}
    set_params(folder, **{f"zeroshot_qwen__{key}": value for key, value in block.items()})
    run_stage("zeroshot_qwen")
    return record(folder, "zeroshot_qwen")


@case_of
def zeroshot_qwen(patch: Patch) -> dict:
    return ask(patch, "auto", "likelihood")


@case_of
def zeroshot_qwen_generate(patch: Patch) -> dict:
    return ask(patch, "fp16", "generate")


# --- Waits -----------------------------------------------------------------------------------


class NoStates:
    """Training states that are not kept."""

    def load(self) -> None:
        return None


def waits_of_training(patch: Patch, precision: str, **changes) -> dict:
    """Count the waits of a step: those of an epoch less those of one half as long."""
    accelerator = start(0, precision)
    task = task_of(patch.checkpoints / "siglip", draw(32), accelerator, **changes)
    state = loop.begin(task, NoStates())
    parallel, optimizer = accelerator.prepare(task.model, state.optimizer)

    def epoch(begin: int) -> None:
        state.step = begin
        for _ in loop.train_epoch(task, state, parallel, optimizer, np.random.default_rng(0)):
            pass

    epoch(0)  # fills caches
    whole, half = (waits(epoch, begin) for begin in (0, task.steps // 2))
    return {"per_step": (whole - half) / (task.steps // 2), "per_epoch": whole}


@case_of
def waits_bf16(patch: Patch) -> dict:
    return waits_of_training(patch, "bf16")


@case_of
def waits_fp16_adversary(patch: Patch) -> dict:
    return waits_of_training(patch, "fp16", adversary="modality", micro_batch=3)


@case_of
def waits_memory_map(patch: Patch) -> dict:
    patch.setattr(image_store, "_fits", lambda *_: False)
    return waits_of_training(patch, "bf16")


@case_of
def waits_inference(patch: Patch) -> dict:
    """Count the waits of a batch in evaluation."""
    accelerator, checkpoint = start(0, "bf16"), patch.checkpoints / "siglip"
    objective = task_of(checkpoint, draw(32), accelerator, batch_size=2).objective
    objective.classifier.eval()
    rows = np.arange(32)
    objective.predict(rows)
    whole, half = (waits(objective.predict, part) for part in (rows, rows[:16]))
    return {"per_batch": (whole - half) / 4}


# --- All -------------------------------------------------------------------------------------


def main(folder: Path, *names: str) -> None:
    make = load_script("data/make_checkpoints.py")
    for family, arguments in (("siglip", (32, 8)), ("qwen", ())):
        (folder / family).mkdir(parents=True)
        getattr(make, f"make_{family}")(folder / family, *arguments)
    for family in ("resnet", "efficientnet"):
        path = folder / {"resnet": "resnet50", "efficientnet": "efficientnet_b0"}[family]
        path.mkdir()
        getattr(make, f"make_{family}")(path, 32)
    found = {}
    for name in names or CASES:
        print(name, file=sys.stderr, flush=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        patch = Patch(folder / f"case-{name}", folder)
        try:
            with on_device():
                found[name] = CASES[name](patch)
        except (Exception, SystemExit):
            found[name] = {"error": traceback.format_exc()}
        finally:
            patch.undo()
    (folder / "found.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
