"""Kill, fuzz and load for longer than a test may, and write down what was survived.

Writes  benchmarks/results/soak.json   kills and runs alike, executions of the fuzzer, kinds of bad
                                       input, hours

    python benchmarks/soak.py                     (or: make soak; about an hour on two CPU cores)
    python benchmarks/soak.py --kills 10 --examples 500
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from measure import circumstances

from chest.commands import parser
from chest.errors import ChestError, run
from chest.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    content = {**circumstances(ROOT), "when": datetime.now(UTC).strftime("%Y-%m-%d")}

    # 1. Every stage, killed again and again: whole files alone, and the same bytes in the end.
    printed, hours = pytest("tests/test_ends.py", "-k", "killed", CHEST_KILLS=options.kills)
    content["kills"] = {"each_stage": options.kills, **read_kills(printed), "hours": hours}

    # 2. Made-up input for every reader.
    printed, hours = pytest("tests/test_fuzz.py", "--hypothesis-show-statistics",
                            CHEST_FUZZ_EXAMPLES=options.examples)  # fmt: skip
    content["fuzz"] = {**read_executions(printed), "crashes": 0, "hours": hours}

    # 3. Bad files and poisoned results.
    printed, hours = pytest("tests/test_corpus.py", "tests/test_poisoned.py")
    content["corpus"] = {**count_kinds(), "hours": hours}
    write_json(options.into / "soak.json", content)


def read_kills(printed: str) -> dict[str, int]:
    """How many runs were struck, and died, and how many went on to the end with the same bytes."""
    line = r"kills survived: (\d+) of (\d+), whole runs between: (\d+)"
    survived, tried, whole = map(int, re.search(line, printed).groups())
    return {"runs": tried, "killed_before_the_end": survived, "byte_identical_between": whole}


def read_executions(printed: str) -> dict[str, int]:
    """How many readers the fuzzer tried, and how many inputs, from hypothesis' statistics."""
    line = r"(\d+) passing, 0 failing, and (\d+) invalid test cases"
    counts = [int(x) + int(y) for x, y in re.findall(line, printed)]
    return {"readers": len(counts), "executions": sum(counts)}


def count_kinds() -> dict[str, int]:
    """How many kinds of bad and odd input tests/corpus.py lists: refused, or read rightly."""
    lists = runpy.run_path(str(ROOT / "tests/corpus.py"))
    cases = [case for name in ("VOLUMES", "PICTURES", "TREES") for case in lists[name]]
    refused = sum(bool(case.told) for case in cases)
    return {"kinds": len(cases), "refused": refused, "read": len(cases) - refused}


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=50, help="of each stage")
    options.add_argument("--examples", type=int, default=20_000, help="for each reader")
    options.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    return options.parse_args(arguments)


def pytest(*arguments: str, **environment: int) -> tuple[str, float]:
    """Run tests, with these variables set; returns what they print, and how many hours it took.

    Raises ChestError where one fails, with what it says.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-s", *arguments]
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ChestError(f"{' '.join(arguments)}:\n{done.stdout[-10_000:]}")
    return done.stdout, round((time.monotonic() - began) / 3600, 3)


if __name__ == "__main__":
    run(main)
