"""Lock every dependency, direct or not: its version, and the hash of each of its files.

Reads   requirements-dev.txt with requirements.txt, and the locks themselves: a version that is
        locked stays, unless a pin says otherwise. Asks the package index, and downloads nothing but
        what pip offers as PyTorch's CPU build on this machine.
Writes  requirements-build.lock   setuptools, which builds the project and what comes as source
        requirements.lock         everything else but PyTorch
        requirements-cpu.lock     PyTorch's CPU build
        requirements-cuda.lock    PyTorch's CUDA build, and what it alone needs

    pip install uv==0.13.9
    python tools/lock.py
    python tools/lock.py --upgrade      # the newest release of whatever no pin holds

`make venv` installs the locks where they fit; tests/test_supply.py compares them with what is
installed. They name no index: where pip is told of one with CPU builds, it takes those.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chest.commands import parser
from chest.errors import ChestError, run
from chest.files import write_text

REQUIREMENTS = Path("requirements-dev.txt")
BUILD, MAIN, CPU, CUDA = (
    Path(f"requirements{part}.lock") for part in ("-build", "", "-cpu", "-cuda")
)
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_28"
HEADER = f"# Made by `python tools/lock.py` for CPython {PYTHON}, Linux x86_64; not by hand.\n"
CUDA_NAMES = ("cuda-", "nvidia-", "triton")


class LockError(ChestError):
    """The versions cannot be found, or not all of them have a hash."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    before = read_locks()
    found = resolve({} if options.upgrade else before)
    parts = part(found) | {CPU: {"torch": cpu_build(version(found["torch"]))}}
    for path, blocks in parts.items():
        write_text(path, HEADER + "".join(blocks[name] for name in sorted(blocks)))
    print(", ".join(f"{path}: {len(blocks)}" for path, blocks in parts.items()))
    for name in sorted({*before, *found}):
        old, new = version(before.get(name)), version(found.get(name))
        if old != new:
            print(f"{name}: {old or 'new'} -> {new or 'gone'}")


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("--upgrade", action="store_true", help="keep no version that is locked")
    return command.parse_args(arguments)


def read_blocks(text: str) -> dict[str, str]:
    """A lock's text, cut into {package: its lines}; comments between packages are left out."""
    blocks = re.findall(r"^[\w.-]+==.*\n(?:[ \t]+.*\n)*", text, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks}


def read_locks() -> dict[str, str]:
    """{package: its lines} of the locks that are there, PyTorch as on the default index."""
    paths = [path for path in (BUILD, MAIN, CUDA) if path.exists()]
    return read_blocks("".join(path.read_text(encoding="utf-8") for path in paths))


def resolve(locked: dict[str, str]) -> dict[str, str]:
    """{package: its lines} of all that the requirements bring; `locked` versions stay.

    Raises LockError where uv is missing or finds no versions that fit together.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "requirements.lock"
        output.write_text("".join(locked.values()), encoding="utf-8")  # what uv prefers
        told(
            "uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header",
            "--annotation-style", "line", "--no-emit-package", "chest",
            "--python-version", PYTHON, "--python-platform", PLATFORM,
            "--output-file", str(output), str(REQUIREMENTS),
        )  # fmt: skip
        return read_blocks(output.read_text(encoding="utf-8"))


def told(*command: str) -> str:
    """What a command prints; raises LockError where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise LockError(f"{command[0]} is missing: pip install {command[0]}") from None
    if done.returncode:
        raise LockError(f"{command[0]} failed, and the locks are as they were:\n{done.stderr}")
    return done.stdout


def cpu_build(torch: str) -> str:
    """The lines of PyTorch `torch`'s CPU build: what the lock has, else what pip takes for it here.

    Raises LockError where the lock is of another version, and pip is told of no such build.
    """
    requirement = f"torch=={torch}+cpu"
    if CPU.exists() and requirement in (text := CPU.read_text(encoding="utf-8")):
        return read_blocks(text)["torch"]
    report = told(
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps",
        "--quiet", "--report", "-", requirement,
    )  # fmt: skip
    (build,) = json.loads(report)["install"]
    value = build["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{requirement} \\\n    --hash=sha256:{value}\n"


def version(block: str | None) -> str | None:
    """Of a package's lines; None for none."""
    return re.match(r"[\w.-]+==(\S+)", block)[1] if block else None


def part(found: dict[str, str]) -> dict[Path, dict[str, str]]:
    """{lock: its packages}; CUDA's are named so, and needed by PyTorch or each other alone."""

    def of_cuda(name: str) -> bool:
        needed_by = re.search(r"# via (.+)", found[name])[1].split(", ")
        return name.startswith(CUDA_NAMES) and all(
            other == "torch" or other.startswith(CUDA_NAMES) for other in needed_by
        )

    lock = {name: CUDA if of_cuda(name) else MAIN for name in found}
    lock |= {"setuptools": BUILD, "torch": CUDA}
    return {
        path: {name: block for name, block in found.items() if lock[name] == path}
        for path in (BUILD, MAIN, CUDA)
    }


if __name__ == "__main__":
    run(main)
