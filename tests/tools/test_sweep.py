"""The sweep on a pipeline of one stage: it chooses by validation, repeats nothing, tidies up."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from dvc.utils.hydra import apply_overrides
from support import ROOT, commit, environment, load_script, run_in

from chest.core.errors import ChestError

PARAMS = """seed: 42
profile: phantom
split:
  seed: null
  external: []
  folds: null
  fold: 0
evaluation:
  primary: model
model:
  lr: 1.0
  wait: 0
"""
PIPELINE = """
stages:
  toy:
    cmd: python toy.py
    deps:
      - toy.py
    params:
      - seed
      - split
      - model
    outs:
      - metrics:
          cache: false
      - plots:
          cache: false
"""
# Validation prefers lr 1; the test split prefers lr 2.
TOY = f"""
import sys, time, yaml
from pathlib import Path
from dataclasses import replace
params = yaml.safe_load(Path("params.yaml").read_text())
Path("runs.log").open("a").write("run ")
time.sleep(params["model"]["wait"])
sys.path.insert(0, {str(ROOT / "tests")!r})
from answers import a_system, write_run
lr, seed, split = params["model"]["lr"], params["seed"], params["split"]
system = a_system("model", wrong=20 + seed if lr == 1 else 5, patients=60, sites=("A", "B's"))
answers = system.answers
answers.loc[answers["site"].isin(split["external"]), "split"] = "external"
if split["folds"]:
    answers = answers[answers.index % split["folds"] == split["fold"]]
system = replace(system, answers=answers)
write_run(".", system, val=0.9 + seed / 100 if lr == 1 else 0.8)
counts = answers.rename(columns={{"actual": "label"}}).groupby(["label", "collection", "site"])
counts.size().reset_index(name="images").to_csv("metrics/audit.csv", index=False)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    files = {"params.yaml": PARAMS, "dvc.yaml": PIPELINE, "toy.py": TOY, ".gitignore": "runs.log\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    run_in(folder, "git", "init", "--quiet")
    run_in(folder, "dvc", "init", "--quiet")
    run_in(folder, "dvc", "repro", "--quiet", PYTHONPATH=str(ROOT))
    commit(folder)
    return folder


@pytest.fixture
def toy(template, monkeypatch):
    """The repository of the toy pipeline; tests share it, each with its own seeds."""
    monkeypatch.chdir(template)
    for name, value in (environment(template) | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    (template / "runs.log").write_text("")
    return template


@pytest.fixture
def quick(toy, monkeypatch):
    """Run each experiment of a sweep as a plain commit: DVC takes most of the time."""
    refs = {}

    def run_experiment(changes):
        if (key := tuple(changes)) not in refs:
            apply_overrides("params.yaml", changes)
            runpy.run_path("toy.py")
            commit(toy)
            refs[key] = run_in(toy, "git", "rev-parse", "HEAD").strip()
            run_in(toy, "git", "reset", "--quiet", "--hard", "HEAD~1")
        return refs[key]

    monkeypatch.setattr(load_script("tools/sweep.py"), "run_experiment", run_experiment)
    return toy


def sweep(capsys, *arguments):
    load_script("tools/sweep.py").main([*arguments])
    return capsys.readouterr().out


def test_experiments_are_run_once_and_the_working_tree_is_put_back(toy, capsys):
    arguments = ["--seeds", "1", "--vary", "model.lr=1,2"]
    table = sweep(capsys, *arguments)
    assert "Chosen by val_within: lr=1" in table
    assert "| lr=2 | 1 |" not in table
    assert run_in(toy, "git", "status", "--porcelain") == ""
    assert "lr: 1.0" in (toy / "params.yaml").read_text()
    # Again: nothing is run, and the test figures of all settings are marked.
    shown = sweep(capsys, *arguments, "--show-test")
    assert (toy / "runs.log").read_text() == "run " * 2
    assert "shown on request: no choice may rest on it" in shown
    assert "| lr=2 | 1 | 0.917 " in shown


def test_it_chooses_by_validation_and_shows_the_mean_over_seeds(quick, capsys):
    table = sweep(capsys, "--seeds", "1", "3", "19", "--vary", "model.lr=1,2")
    assert "| lr=1 | 0.977 ± 0.099 |" in table
    assert "| lr=2 | 0.800 ± 0.000 |" in table
    assert "Chosen by val_within: lr=1" in table
    # 21, 23 and 39 of 60 wrong in each class: the mean over the three runs.
    value, low, high = interval_of(table, "lr=1")
    assert value == pytest.approx(1 - (21 + 23 + 39) / 180, abs=1e-3)
    one = sweep(capsys, "--seeds", "3", "--vary", "model.lr=1")
    assert high - low > 1.5 * np.ptp(interval_of(one, "lr=1")[1:])  # the seeds' noise is in it


def interval_of(table, name):
    row = next(x for x in table.splitlines() if re.match(rf"\| {name} \| \d \|", x))
    return [float(x) for x in re.findall(r"0\.\d+", row)[:3]]


def test_a_dirty_tree_is_refused_and_left_alone(toy, capsys):
    (toy / "params.yaml").write_text(PARAMS.replace("seed: 42", "seed: 7"))
    try:
        with pytest.raises(ChestError, match=r"uncommitted changes.*\n M params.yaml"):
            sweep(capsys, "--seeds", "1")
        assert "seed: 7" in (toy / "params.yaml").read_text()
    finally:
        (toy / "params.yaml").write_text(PARAMS)


def test_folds_are_pooled_so_that_each_image_is_tested_once(quick, capsys):
    table = sweep(capsys, "--folds", "2", "-S", "model.lr=2")
    assert (quick / "runs.log").read_text() == "run " * 2
    assert interval_of(table, "model")[0] == 0.917  # of all 240 images, 20 are wrong


def test_each_site_is_held_out_once(quick, capsys):
    table = sweep(capsys, "--leave-one-site-out", "-S", "model.lr=2")
    rows = [line for line in table.splitlines() if line.startswith(("| A |", "| B's |"))]
    assert len(rows) == 4
    assert rows[0].startswith("| A | CT | 60 | 60 | 0.933 (")  # 2 of 30 wrong inside
    assert "| 0.900 (" in rows[0]  # and 3 of 30 at the site


def test_a_run_that_fails_puts_the_working_tree_back(toy, capsys):
    with pytest.raises(ChestError, match="dvc exp run"):
        sweep(capsys, "--seeds", "1", "-S", "model.wait=never")
    assert run_in(toy, "git", "status", "--porcelain") == ""


def test_ctrl_c_ends_the_running_experiment(toy):
    command = [sys.executable, str(ROOT / "tools/sweep.py"), "--seeds", "8", "-S", "model.wait=600"]
    process = subprocess.Popen(command, cwd=toy, stderr=subprocess.PIPE, text=True)
    while not (toy / "runs.log").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "python toy.py" not in processes
    assert run_in(toy, "git", "status", "--porcelain") == ""
