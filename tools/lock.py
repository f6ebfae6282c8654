"""Lock the version and the hashes of every dependency, direct or not, with uv.

Reads   requirements-dev.txt, requirements.txt, and the locks: a locked version stays where it fits
Writes  requirements-build.lock   setuptools, which builds this project
        requirements.lock         everything else but PyTorch
        requirements-cpu.lock     PyTorch's CPU build
        requirements-cuda.lock    PyTorch's CUDA build and the libraries that it alone needs

    pip install uv==0.13.9
    python tools/lock.py
    python tools/lock.py --upgrade      # the newest release of whatever no pin holds

PyTorch's CPU build is not on the default index: after a new pin of torch, tell uv where it is, with
UV_FIND_LINKS or UV_INDEX.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from chest.core.errors import ChestError
from chest.core.files import write_text
from chest.core.runtime import parser, run_tool

PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_28"
HEADER = f"# Made by `python tools/lock.py` for CPython {PYTHON}, Linux x86_64; not by hand.\n"
BUILD, MAIN, CPU, CUDA = (Path(f"requirements{x}.lock") for x in ("-build", "", "-cpu", "-cuda"))
COMPILE = (
    "uv pip compile --quiet --generate-hashes --no-header --annotation-style line --no-emit-package"
    f" chest --python-version {PYTHON} --python-platform {PLATFORM}"
).split()
OF_CUDA = re.compile(r"torch==|(cuda|nvidia|triton).*\n( +--.*\n)+ +# via (cuda|nvidia|torch)")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--upgrade", action="store_true", help="keep no version that is locked")
    locks = [] if options.parse_args().upgrade else [BUILD, MAIN, CUDA]
    found = resolve("requirements-dev.txt", *locks)
    torch = found["torch"].split()[0]
    parts = {BUILD: {}, MAIN: {}, CUDA: {}, CPU: resolve("-", CPU, requirement=f"{torch}+cpu")}
    for name, block in found.items():
        lock = CUDA if OF_CUDA.match(block) else BUILD if name == "setuptools" else MAIN
        parts[lock][name] = block
    for path, part in parts.items():
        write_text(path, HEADER + "".join(block for _, block in sorted(part.items())))


def resolve(source: str, *locks: Path, requirement: str = "") -> dict[str, str]:
    """Return {package: its lines in a lock} of all that `source` brings, or `requirement` alone.

    Versions in `locks` are kept where they fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "requirements.lock"
        output.write_text("".join(path.read_text(encoding="utf-8") for path in locks))
        command = [*COMPILE, "--output-file", str(output), source]
        command += ["--no-deps"] if requirement else []
        done = subprocess.run(command, input=requirement, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise ChestError("uv could not resolve the requirements; the locks are as they were")
        text = output.read_text(encoding="utf-8")
    blocks = re.findall(r"^[\w.-]+==.*\n(?:[ \t]+.*\n)*", text, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks}


if __name__ == "__main__":
    run_tool(main)
