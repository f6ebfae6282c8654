"""What a run has done survives its end: the state of a training, and answers already given.

It lies below .resume/<stage>/, which neither Git nor DVC tracks: what DVC tracks would pass for a
result. A later run takes it up only where everything that the result depends on is the same (its
origin), and says so where it is not.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from chest.compute import LIBRARIES, Source, device_name, saving
from chest.dataset import IMAGES, MANIFEST, SPLIT
from chest.errors import printable
from chest.files import remove, replacing, require_file, write_json
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
    digest of it all.
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
            content = {"origin": self.origin, "values": values}
            write_json(partial / "state.json", {"digest": _seal(file, content), **content})
        for state in self._found()[:-KEPT]:
            remove(state)

    def load(self, take_up: Callable[[dict[str, torch.Tensor], dict], None]) -> None:
        """Have the newest state that is whole and of this origin taken up, if there is one.

        `take_up` gets its tensors (on the CPU) and values; whatever it raises, the state is not
        whole. States that are not are set aside, and a line says why.
        """
        for state in reversed(self._found()):
            try:
                content = _read_json(state / "state.json")
                file = state / "state.safetensors"
                if content.pop("digest") != _seal(_regular(file), content):
                    raise ValueError("its digest differs")
                other = differences(content["origin"], self.origin)
                if not other:
                    take_up(load_file(file), content["values"])
                    return
                reason = f"it comes from a run with other {other}"
            except Exception as error:  # whatever may lie there: the training can start over
                reason = f"it is damaged ({type(error).__name__}: {printable(error)})"
            print(f"{state} is not taken up: {reason}", file=sys.stderr)
            aside = state.with_name(state.name + ASIDE)
            remove(aside)
            state.rename(aside)

    def clear(self) -> None:
        """Forget them: the training is done."""
        remove(self.folder)

    def _found(self) -> list[Path]:
        states = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in states if path.suffix != ASIDE)


# --- Answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """Answers of a stage that have been given: a line for each batch that is done.

    It holds the digest of the json that follows. Each process writes a file of its own; what a
    killed process half wrote, or was changed since, does not count. Make it with `open_journal`.
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
        text = json.dumps([[*pair] for pair in answers.items()])
        with open(self.folder / f"answers-{self.process}.jsonl", "a", encoding="utf-8") as file:
            # The line feed comes first: so a torn line before it stays a line of its own.
            file.write(f"\n{_line_digest(text)} {text}\n")

    def clear(self) -> None:
        """Forget them: the stage is done."""
        remove(self.folder)


def open_journal(accelerator: Accelerator, stage: str, origin: Origin) -> Journal:
    """The stage's journal; where it is of another origin it is emptied, and a line says why."""
    journal = Journal(WORK / stage, accelerator.process_index)
    if accelerator.is_main_process:
        path = journal.folder / "origin.json"
        files = [*journal.folder.glob("answers-*")]
        try:
            for file in files:
                _regular(file)
            other = differences(_read_json(path), origin)
        except Exception:  # whatever may lie there: everything can be asked anew
            other = "everything"
        if other:
            if files:
                print(f"{journal.folder}: the answers are not taken up: they come from a run with"
                      f" other {other}", file=sys.stderr)  # fmt: skip
            remove(journal.folder)
            write_json(path, origin)
    accelerator.wait_for_everyone()
    return journal


def _pairs(line: str) -> Iterator[tuple[int, object]]:
    """Row and answer of each entry of a line; nothing where it is torn or changed."""
    digest, _, text = line.partition(" ")
    if digest == _line_digest(text):
        yield from json.loads(text)


def _line_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seal(tensors: Path, content: dict) -> str:
    """SHA-256 of a state: of the tensors' file, and of the content of state.json."""
    return hashlib.sha256(f"{_digest([tensors])} {json.dumps(content)}".encode()).hexdigest()


def _read_json(path: Path):
    return json.loads(_regular(path).read_text(encoding="utf-8"))


def _regular(path: Path) -> Path:
    """`path`; raises OSError where it is no regular file itself."""
    if path.is_symlink():
        raise OSError(f"{path.name} is a link")
    require_file(path)
    return path


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(files: list[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
