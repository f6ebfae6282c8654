"""Run every command of the documents as a reader would, in a fresh clone.

    python benchmarks/documents.py        (or: make docs)

The commands run in the order of the documents; the exit code is 1 if one fails. What follows the
line `<!-- not run: REASON -->`, up to the next heading, is left out.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from chest.core.errors import ChestError
from chest.core.runtime import parser, run

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md", "data/**/README.md")
COMMAND = re.compile(r"(?: {4})?((?:make|dvc|python|git|source|accelerate|hf|pre-commit|pip) .+)")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


def main() -> None:
    parser(__doc__).parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
        documents = sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))
        for document in documents:
            for command in commands(document.read_text(encoding="utf-8")):
                failed += not succeeds(command, clone, env)
    if failed:
        raise ChestError(f"{failed} commands failed")


def commands(text: str) -> Iterator[str]:
    """Yield the commands in the code blocks of a document; print those that are not run."""
    reason = ""
    for line in text.replace("\\\n", " ").splitlines():
        if note := NOT_RUN.search(line):
            reason = note[1]
        elif line.startswith("#"):
            reason = ""  # it holds to the end of the section
        elif command := COMMAND.fullmatch(line):
            if reason:
                print(f"not run ({reason}): {command[1]}", flush=True)
            else:
                yield command[1]


def succeeds(command: str, clone: Path, env: dict[str, str]) -> bool:
    """Run a command, waiting for what it queues; print how it went."""
    began = time.monotonic()
    if command.startswith("dvc exp run") and "--queue" not in command:
        # An experiment starts from what is in the working tree: go back to the commit.
        shell("git checkout -q HEAD -- . && dvc checkout -qf", clone, env)
    done = shell(command, clone, env)
    while command.startswith("dvc queue start") and working(clone, env):
        time.sleep(5)
    ended = "FAILED" if done.returncode else "ok"
    print(f"{ended} in {time.monotonic() - began:.0f} s: {command}", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr, flush=True)
    return not done.returncode


def working(clone: Path, env: dict[str, str]) -> bool:
    return bool(re.search("Running|Queued", shell("dvc queue status", clone, env).stdout))


def shell(command: str, clone: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    run(main)
