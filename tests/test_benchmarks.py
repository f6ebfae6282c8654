"""The benchmarks run, and write what a figure needs to be believed."""

import json
import subprocess
import sys

from support import ROOT


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
