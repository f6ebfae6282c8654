"""Answers of an interrupted stage, kept on disk so that no image is classified twice."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from chest.core.files import remove, write_json
from chest.models.common.fingerprint import RESUME_FOLDER, Fingerprint, differences


@dataclass(frozen=True)
class Journal:
    """A file of JSON lines for each process, with one line for each finished batch."""

    folder: Path
    process: int

    def answers(self) -> dict[int, object]:
        """Return {row: answer} of all processes."""
        return {
            row: answer
            for file in sorted(self.folder.glob("answers-*.jsonl"))
            for line in file.read_text(encoding="utf-8").splitlines()
            for row, answer in _parse(line)
        }

    def add(self, answers: dict[int, object]) -> None:
        """Append the answers of one batch."""
        with open(self.folder / f"answers-{self.process}.jsonl", "a", encoding="utf-8") as file:
            # The newline comes first, in case a killed process left an incomplete line.
            file.write(f"\n{json.dumps([*answers.items()])}\n")

    def clear(self) -> None:
        """Remove the journal, once the stage is done."""
        remove(self.folder)


def open_journal(accelerator: Accelerator, stage: str, fingerprint: Fingerprint) -> Journal:
    """Open the journal of `stage`; if its fingerprint differs, empty it and print why."""
    journal = Journal(RESUME_FOLDER / stage, accelerator.process_index)
    if accelerator.is_main_process:
        path = journal.folder / "fingerprint.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        other = differences(found, fingerprint)
        if other:
            if found:
                print(f"{journal.folder}: starting over, changed since: {other}", file=sys.stderr)
            journal.clear()
            write_json(path, fingerprint)
    accelerator.wait_for_everyone()
    return journal


def _parse(line: str) -> list:
    """Return the [row, answer] pairs of a line; none if a killed process left it incomplete."""
    try:
        return json.loads(line)
    except ValueError:
        return []
