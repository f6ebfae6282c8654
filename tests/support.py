"""What several tests share: where things lie, and how a stage is run as a user runs it."""

import importlib
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# True metadata, real images and real tokenizers, where somebody keeps them beside the project.
BESIDE = ROOT.parent / "shared"


def load_script(path: str) -> ModuleType:
    """A script of the repository, as a module: ``data/draw_phantoms.py``."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # so that processes it starts find it too
    return importlib.import_module(Path(path).stem)


def run_stage(name: str, *arguments: str) -> None:
    """Run a stage in the working directory, as `python stages/<name>.py` does."""
    script = str(ROOT / "stages" / f"{name}.py")
    with mock.patch.object(sys, "argv", [script, *arguments]):
        runpy.run_path(script, run_name="__main__")


def failure(name: str, capsys) -> str:
    """The message of a stage that must end with exit code 1."""
    with pytest.raises(SystemExit) as end:
        run_stage(name)
    assert end.value.code == 1
    return capsys.readouterr().err


def write_params(folder: Path, **changes) -> None:
    """params.yaml of the repository with other values: ``{"phantom.expected_counts": None}``."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def copy_repository(folder: Path) -> Path:
    """What a clone of the working tree would hold, committed to a repository of its own."""
    listed = run_in(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run_in(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run_in(folder, "git", "add", "--all")
    run_in(folder, "git", "commit", "--quiet", "--message", "As it is")
    return folder


def run_in(
    folder: Path, *command: str, fails: bool | None = False, network: Path | None = None
) -> str:
    """Run a command in a copy of the repository; returns what it printed.

    It must end as `fails` says; None: either way. With `network` it reaches none, as
    `without_network` has it, and what it tried is in that file.
    """
    env = environment(folder)
    if network:
        env = without_network(env, network)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert fails in (None, done.returncode != 0), f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if command[0] == "dvc" else done.stdout


def environment(folder: Path) -> dict[str, str]:
    """For commands in a copy of the repository: this one's python and dvc, the copy's modules."""
    someone = {"NAME": "Someone", "EMAIL": "someone@example.org"}
    return {
        **os.environ,
        **{f"GIT_{who}_{key}": x for who in ("AUTHOR", "COMMITTER") for key, x in someone.items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
    }


def without_network(env: Mapping[str, str], log: Path) -> dict[str, str]:
    """`env` for commands whose Pythons reach no network, and note each attempt in `log`.

    `log` is there and empty from now on: it must be so at the end.
    """
    log.write_text("")
    path = os.pathsep.join(filter(None, [str(ROOT / "tests/no_network"), env.get("PYTHONPATH")]))
    return {**env, "PYTHONPATH": path, "NETWORK_LOG": str(log)}


def make_pipeline(folder: Path, files: Mapping[str, str]) -> Path:
    """A repository of `files`, {path: text}, whose pipeline was run and its results committed."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    run_in(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run_in(folder, "dvc", "init", "--quiet")
    run_in(folder, "dvc", "repro", "--quiet")
    run_in(folder, "git", "add", "--all")
    run_in(folder, "git", "commit", "--quiet", "--message", "As it is")
    return folder
