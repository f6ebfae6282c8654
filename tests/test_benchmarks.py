"""The benchmarks run, and write what a figure needs to be believed."""

import json
import subprocess
import sys

import corpus
import pytest
from support import ROOT, load_script
from test_ends import tell_kills

from chest.errors import ChestError


def test_every_comparison_runs_and_says_what_it_is(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/run.py", "--tiny", "--name", "x"]
    done = subprocess.run([*command, "--into", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "x.json").read_text())
    assert {"commit", "device", "threads", "torch", "when", "seed"} <= set(content)
    opponents = " ".join(row["opponent"] for row in content["rows"])
    for known in ("get_fdata", "dataobj", "Pillow", "Trainer", "one image at a time", "batches of"):
        assert known in opponents
    for row in content["rows"]:
        assert row["n"] > 0
        assert len(row["ours"]) == len(row["theirs"]) >= 1
        assert min(row["ours"] + row["theirs"]) > 0
        assert row["ratio"] > 0
    table = (tmp_path / "x.md").read_text()
    assert table.count("\n| ") == len(content["rows"]) + 2
    assert "random" in table


# --- The soak --------------------------------------------------------------------------------


@pytest.fixture
def soak():
    return load_script("benchmarks/soak.py")


# As hypothesis tells of a test: the next test reads a real one.
STATISTICS = "    - {} passing, 0 failing, and {} invalid test cases\n"


def test_a_soak_writes_down_what_was_survived(soak, tmp_path, monkeypatch):
    asked = []

    def pytest_of(*arguments, **environment):
        asked.append((arguments, environment))
        printed = {"ends": tell_kills({"split": 3, "audit": 3}, 8, 4),
                   "fuzz": STATISTICS.format(20, 5) + STATISTICS.format(10, 0)}  # fmt: skip
        return printed.get(arguments[0][11:15], "9 passed"), 0.25

    monkeypatch.setattr(soak, "pytest", pytest_of)
    soak.main(["--kills", "3", "--examples", "20", "--into", str(tmp_path)])
    content = json.loads((tmp_path / "soak.json").read_text())
    assert content["kills"] == {"each_stage": 3, "runs": 8, "killed_before_the_end": 6,
                                "byte_identical_between": 4, "hours": 0.25}  # fmt: skip
    assert content["fuzz"] == {"readers": 2, "executions": 35, "crashes": 0, "hours": 0.25}
    kinds = {case.kind for part in (corpus.VOLUMES, corpus.PICTURES, corpus.TREES) for case in part}
    told = content["corpus"]
    assert told["refused"] + told["read"] == told["kinds"] >= len(kinds)
    assert min(told["refused"], told["read"]) > 0
    assert [environment for _, environment in asked] == [
        {"CHEST_KILLS": 3}, {"CHEST_FUZZ_EXAMPLES": 20}, {}
    ]  # fmt: skip
    for arguments, _ in asked:
        assert all((ROOT / name).exists() for name in arguments if name.startswith("tests/"))


TRIED = """from hypothesis import given, settings, strategies as st

@settings(max_examples=7, database=None)
@given(st.integers())
def test_a_reader(x):
    assert {}
"""


def test_a_soak_counts_what_the_fuzzer_tried_and_ends_where_it_finds_something(soak, tmp_path):
    path = tmp_path / "test_made.py"
    path.write_text(TRIED.format(True))
    printed, hours = soak.pytest(str(path), "--hypothesis-show-statistics", CHEST_SOAK=1)
    assert soak.read_executions(printed) == {"readers": 1, "executions": 7}
    assert hours < 0.1
    path.write_text(TRIED.format(False))
    with pytest.raises(ChestError, match="1 failed"):
        soak.pytest(str(path))
