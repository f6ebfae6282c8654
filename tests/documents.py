"""The commands in the documents, and a way to run all of them as a reader would.

    python tests/documents.py        (or: make docs)

runs them in a clone in an empty folder, in their order, and says which failed. What follows
the line `<!-- not run: REASON -->`, up to the next heading, is left out, and the reason is told.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/*.md",
    "data/*/README.md",
    "data/*/*/README.md",
)
STARTS = ("make", "dvc", "python", "git", "source", "accelerate", "hf", "pre-commit")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


@dataclass(frozen=True)
class Command:
    """A line that a document tells its reader to type; `reason` where it is not run."""

    document: str
    line: int
    text: str
    reason: str = ""

    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def documents() -> list[Path]:
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def commands(document: Path) -> list[Command]:
    """Every command in the code blocks of a document, continued lines joined."""
    found, reason, joined, start = [], "", "", 0
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        if note := NOT_RUN.search(line):
            reason = note[1]
        elif line.startswith("#"):
            reason = ""  # it holds to the end of the chapter
        text = joined + line.strip()
        if not joined:
            in_block = line.startswith("    ") or line.startswith(STARTS)
            if not in_block or not text.startswith(tuple(f"{word} " for word in STARTS)):
                continue
            start = number
        if text.endswith("\\"):
            joined = text.removesuffix("\\")
            continue
        joined = ""
        name = document.relative_to(ROOT).as_posix()
        found.append(Command(name, start, text.split("  #")[0].rstrip(), reason))
    return found


def reset(clone: Path, env: dict[str, str]) -> None:
    """Go back to the commit: an experiment starts from what is in the working directory."""
    for command in (["git", "checkout", "-q", "HEAD", "--", "."], ["dvc", "checkout", "-qf"]):
        subprocess.run(command, cwd=clone, env=env, capture_output=True)


def working(clone: Path, env: dict[str, str]) -> bool:
    """Whether DVC's queue still has something to do."""
    command = ["dvc", "queue", "status"]
    told = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True).stdout
    return bool(re.search("Running|Queued", told))


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
        for command in (command for document in documents() for command in commands(document)):
            if command.reason:
                print(f"not run ({command.reason}): {command.text}", flush=True)
                continue
            if command.text.startswith("dvc exp run") and "--queue" not in command.text:
                reset(clone, env)
            began = time.monotonic()
            done = subprocess.run(
                ["bash", "-c", command.text], cwd=clone, env=env, capture_output=True, text=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            while command.text.startswith("dvc queue start") and working(clone, env):
                time.sleep(5)
            ended = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
            print(f"{ended} in {time.monotonic() - began:.0f} s: {command.text}", flush=True)
            if done.returncode:
                failed += 1
                print(f"{command.document}:{command.line}\n{done.stdout}{done.stderr}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
