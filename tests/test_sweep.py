"""The sweep: every variation with every seed as a DVC experiment, mean and spread in one table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, load_script, make_pipeline, run_in

from chest.errors import run

# A pipeline of one stage: its metric is the learning rate times the seed, and ten times that.
STAGE = """\
import json
from pathlib import Path
import yaml
params = yaml.safe_load(Path("params.yaml").read_text())
if params["seed"] == 77:  # it takes its time, also to end
    import os, signal, sys, time
    def end(*_):
        time.sleep(0.5)
        Path("ended").write_text("tidied up")
        sys.exit(1)
    signal.signal(signal.SIGTERM, end)
    Path("partial").write_text(str(os.getpgrp()))
    os.replace("partial", "began")
    time.sleep(60)
uar = float(params["lr"]) * params["seed"]
Path("metrics.json").write_text(json.dumps({"a": {"uar": uar}}))
# A second file about the same system.
Path("within.json").write_text(json.dumps({"a": {"within": {"ct": {"uar": 10 * uar}}}}))
"""
PIPELINE = {
    "stages": {
        "score": {
            "cmd": "python stage.py",
            "deps": ["stage.py"],
            "params": ["seed", "lr"],
            "metrics": [{f"{name}.json": {"cache": False}} for name in ("metrics", "within")],
        }
    }
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    params = "seed: 5\nlr: 0.5\n"
    files = {"stage.py": STAGE, "dvc.yaml": json.dumps(PIPELINE), "params.yaml": params}
    return make_pipeline(tmp_path_factory.mktemp("swept"), files)


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.chdir(made)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Someone")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "someone@example.org")
    return made


def sweep(*arguments):
    load_script("tools/sweep.py").main(arguments)


def test_mean_and_spread_over_the_seeds_of_each_variation(place, capsys):
    metrics = ("--metric", "a.uar", "--metric", "a.within.ct.uar")
    wanted = ("--seeds", "1", "3", "--vary", "lr=0.1,0.2", *metrics)
    sweep(*wanted)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "| seeds 1, 3 | a.uar | a.within.ct.uar |",
        "| --- | --- | --- |",
        "| lr=0.1 | 0.200 ± 0.141 | 2.000 ± 1.414 |",
        "| lr=0.2 | 0.400 ± 0.283 | 4.000 ± 2.828 |",
    ]
    assert "was run" not in printed.err
    assert len(run_in(place, "dvc", "exp", "list", "--name-only").split()) == 4
    # Everything is put back, and what was run is not run again.
    assert run_in(place, "git", "status", "--porcelain") == ""
    assert json.loads((place / "metrics.json").read_text()) == {"a": {"uar": 2.5}}
    sweep(*wanted)
    again = capsys.readouterr()
    assert again.out == printed.out
    assert again.err.count("(was run)") == 4


def test_one_seed_has_no_spread(place, capsys):
    sweep("--seeds", "2", "-S", "lr=0.4", "--metric", "a.uar")
    assert "| as committed | 0.800 |" in capsys.readouterr().out


def failed(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run(lambda: sweep(*arguments))
    assert end.value.code == 1
    return capsys.readouterr().err


def test_uncommitted_changes_are_not_overwritten(place, capsys):
    (place / "params.yaml").write_text("seed: 5\nlr: 0.7\n")
    try:
        assert "uncommitted changes" in failed(capsys, "--seeds", "1")
        assert "0.7" in (place / "params.yaml").read_text()
    finally:
        run_in(place, "git", "checkout", "--quiet", "--", ".")


def test_a_run_that_fails_is_told_and_the_rest_put_back(place, capsys):
    message = failed(capsys, "--seeds", "1", "-S", "lr=none")
    assert "dvc exp run" in message
    assert run_in(place, "git", "status", "--porcelain") == ""


def test_a_metric_that_is_not_there_is_named(place, capsys):
    message = failed(capsys, "--seeds", "2", "-S", "lr=0.4", "--metric", "a.war")
    assert "no metric a.war" in message


def test_a_variation_without_values_is_refused(place, capsys):
    for text in ("lr", "lr=", "=1", "lr=1,"):
        assert f"--vary {text}" in failed(capsys, "--seeds", "1", "--vary", text)
    with pytest.raises(SystemExit) as end:
        sweep("--seeds", "1", "1")
    assert end.value.code == 2


def under_way(place):
    """A sweep whose run has begun and lasts."""
    for name in ("began", "ended"):
        (place / name).unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/sweep.py"), "--seeds", "77", "--metric", "a.uar"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (place / "began").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_before_all_is_put_back(place, number):
    with under_way(place) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert (place / "ended").read_text() == "tidied up"
    for name in ("began", "ended"):
        (place / name).unlink()
    assert run_in(place, "git", "status", "--porcelain") == ""
    sweep("--seeds", "1", "--metric", "a.uar")  # nothing holds up the next one


def test_after_a_killed_sweep_the_next_one_says_how_to_put_back(place, capsys):
    with under_way(place) as process:
        process.kill()
    try:
        message = failed(capsys, "--seeds", "1", "--metric", "a.uar")
        assert "commit or stash" not in message
        assert "a sweep was killed" in message
        assert "params.yaml" in message
    finally:
        os.killpg(int((place / "began").read_text()), signal.SIGKILL)  # the run that it left
    commands = [line.split() for line in message.splitlines() if line.startswith("    ")]
    assert len(commands) == 2
    for command in commands:
        run_in(place, *command)
    sweep("--seeds", "1", "--metric", "a.uar")
    (place / "began").unlink()
    assert run_in(place, "git", "status", "--porcelain") == ""


def test_elsewhere_than_in_a_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / ".git", ignore_errors=True)
    assert "git status" in failed(capsys, "--seeds", "1")
