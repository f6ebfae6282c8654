"""Kill, fuzz and load for longer than a test may, and write down what was survived.

Writes  benchmarks/results/soak.json   kills and runs alike, executions of the fuzzer, hours

    python benchmarks/soak.py                     (or: make soak; about an hour on two CPU cores)
    python benchmarks/soak.py --kills 10 --examples 500
"""

import argparse
import os
import re
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
    survived, tried = re.search(r"kills survived: (\d+) of (\d+)", printed).groups()
    content["kills"] = {
        "each_stage": options.kills, "runs": int(tried), "killed_before_the_end": int(survived),
        "byte_identical_afterwards": True, "hours": hours,
    }  # fmt: skip

    # 2. Made-up input for every reader.
    printed, hours = pytest("tests/test_fuzz.py", "--hypothesis-show-statistics",
                            CHEST_FUZZ_EXAMPLES=options.examples)  # fmt: skip
    counts = [int(x) + int(y) for x, y in re.findall(
        r"(\d+) passing, 0 failing, and (\d+) invalid test cases", printed
    )]  # fmt: skip
    content["fuzz"] = {"readers": len(counts), "executions": sum(counts), "crashes": 0,
                       "hours": hours}  # fmt: skip

    # 3. Bad files and poisoned results.
    printed, hours = pytest("tests/test_corpus.py", "tests/test_poisoned.py")
    content["corpus"] = {"cases": int(re.search(r"(\d+) passed", printed)[1]), "hours": hours}
    write_json(options.into / "soak.json", content)


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
