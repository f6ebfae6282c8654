"""What a run has done survives its end: the state of a training, and answers already given.

It lies below .resume/<stage>/, which neither Git nor DVC tracks: what DVC tracks would pass for a
result. A later run takes it up only where everything that the result depends on is the same (its
origin), and says so where it is not.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chest.compute import LIBRARIES, Source, device_name, saving
from chest.dataset import IMAGES, MANIFEST, SPLIT
from chest.files import remove, replacing, write_json
from chest.running import WORK

KEPT = 2  # states: where the last one is damaged, the one before it serves
ASIDE = ".aside"

Origin = dict[str, str]  # what a result depends on, by name: a digest each


def origin_of(accelerator: Accelerator, source: Source, parameters: dict) -> Origin:
    """Of everything that a stage's result depends on; `parameters` are those that it reads.

    The main process reads it all, for every process.
    """
    origin = _origin(accelerator, source, parameters) if accelerator.is_main_process else None
    return broadcast_object_list([origin])[0]


def _origin(accelerator: Accelerator, source: Source, parameters: dict) -> Origin:
    code = sorted({
        Path(module.__file__)
        for name, module in [*sys.modules.items()]
        if name.startswith("chest.") and getattr(module, "__file__", None)
    } | {Path(sys.argv[0])})  # fmt: skip
    libraries = [version(library) for library in LIBRARIES]
    return {
        "parameters": hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
        "images": _digest([MANIFEST, IMAGES]),
        "split": _digest([SPLIT]),
        "weights": f"{source} {source.commit or _digest(_files(Path(source.checkpoint)))}",
        "code": _digest([path for path in code if path.is_file()]),
        "machine": f"{device_name(accelerator)} x {accelerator.num_processes}, {libraries}",
    }


def differences(found: object, origin: Origin) -> str:
    """The names of what differs between a stored origin and this run's; empty: nothing does."""
    if not isinstance(found, dict):
        return "everything"
    return ", ".join(name for name in origin if found.get(name) != origin[name])


# --- Training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """The states of a stage's training, newest last; at most KEPT of them.

    Each is a folder: state.safetensors holds the tensors, state.json the rest, the origin, and the
    digest of the tensors' file.
    """

    stage: str
    origin: Origin

    @property
    def folder(self) -> Path:
        return WORK / self.stage

    def save(self, step: int, tensors: dict[str, torch.Tensor], values: dict) -> None:
        """Keep the state after `step` steps: `tensors` by name, and `values` that json can hold.

        Raises OSError where there is no room.
        """
        with replacing(self.folder / f"step-{step:08}") as partial:
            partial.mkdir()
            file = partial / "state.safetensors"
            with saving(self.folder):
                save_file({name: x.contiguous() for name, x in tensors.items()}, file)
            content = {"origin": self.origin, "digest": _digest([file]), "values": values}
            write_json(partial / "state.json", content)
        for state in self._found()[:-KEPT]:
            remove(state)

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors (on the CPU) and values of the newest state that is whole and of this origin.

        Those that are not are set aside, and a line says why; None where none is left.
        """
        for state in reversed(self._found()):
            try:
                content = json.loads((state / "state.json").read_text(encoding="utf-8"))
                file = state / "state.safetensors"
                if content["digest"] != _digest([file]):
                    raise ValueError("its digest differs")
                other = differences(content["origin"], self.origin)
                if not other:
                    return load_file(file), content["values"]
                reason = f"it comes from a run with other {other}"
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                reason = f"it is damaged ({error})"
            print(f"{state} is not taken up: {reason}", file=sys.stderr)
            aside = state.with_name(state.name + ASIDE)
            remove(aside)
            state.rename(aside)
        return None

    def clear(self) -> None:
        """Forget them: the training is done."""
        remove(self.folder)

    def _found(self) -> list[Path]:
        states = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in states if path.suffix != ASIDE)


# --- Answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """Answers of a stage that have been given: a line of json for each batch that is done.

    Each process writes a file of its own; what a killed process half wrote is no line and does not
    count. Make it with `open_journal`.
    """

    folder: Path
    process: int

    def answers(self) -> dict[int, object]:
        """{row: answer} of all lines of all processes."""
        return {
            row: answer
            for file in sorted(self.folder.glob("answers-*.jsonl"))
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            for row, answer in _pairs(line)
        }

    def add(self, answers: dict[int, object]) -> None:
        """Append the answers of one batch."""
        with open(self.folder / f"answers-{self.process}.jsonl", "a", encoding="utf-8") as file:
            # The line feed comes first: so a torn line before it stays a line of its own.
            file.write(f"\n{json.dumps([[*pair] for pair in answers.items()])}\n")

    def clear(self) -> None:
        """Forget them: the stage is done."""
        remove(self.folder)


def open_journal(accelerator: Accelerator, stage: str, origin: Origin) -> Journal:
    """The stage's journal; where it is of another origin it is emptied, and a line says why."""
    journal = Journal(WORK / stage, accelerator.process_index)
    if accelerator.is_main_process:
        path = journal.folder / "origin.json"
        try:
            other = differences(json.loads(path.read_text(encoding="utf-8")), origin)
        except FileNotFoundError:
            other = "no origin"
        except (OSError, ValueError):
            other = "everything"
        if other:
            if any(journal.folder.glob("answers-*")):
                print(f"{journal.folder}: the answers are not taken up: they come from a run with"
                      f" other {other}", file=sys.stderr)  # fmt: skip
            remove(journal.folder)
            write_json(path, origin)
    accelerator.wait_for_everyone()
    return journal


def _pairs(line: str) -> Iterator[tuple[int, object]]:
    """Row and answer of each entry of a line; nothing where it is torn."""
    try:
        content = json.loads(line)
        yield from [(int(row), answer) for row, answer in content]
    except (ValueError, TypeError):
        return


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(files: list[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
