"""What several tests share: where things are, and how a stage is run as a user runs it."""

import importlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real images and metadata, if somebody keeps them there


def require_shared(name: str) -> Path:
    """Return the folder `name` of SHARED; skip the test if it is absent."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"needs {name} beside the repository")
    return folder


def load_script(path: str) -> ModuleType:
    """Import a script of the repository as a module, for instance ``data/draw_phantoms.py``."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(Path(path).stem)


def run_stage(name: str, *arguments: str) -> None:
    """Run a stage in the working directory, as ``python stages/<name>.py`` does."""
    script = str(ROOT / "stages" / f"{name}.py")
    with mock.patch.object(sys, "argv", [script, *arguments]):
        runpy.run_path(script, run_name="__main__")


def failure(name: str, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a stage that must end with a message; return the message."""
    with pytest.raises(SystemExit) as end:
        run_stage(name, *arguments)
    assert isinstance(end.value.code, str), end.value.code
    return end.value.code + capsys.readouterr().err


def write_params(folder: Path, **changes) -> None:
    """Write the repository's params.yaml to `folder` with other values, by dotted key."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def copy_repository(folder: Path) -> Path:
    """Commit what a clone of the working tree would hold to a repository in `folder`."""
    listed = run_in(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run_in(folder, "git", "init", "--quiet", "--initial-branch", "main")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    """Commit everything in `folder`."""
    run_in(folder, "git", "add", "--all")
    run_in(folder, "git", "commit", "--quiet", "--message", "Snapshot")


def run_in(folder: Path, *command: str, fails: bool = False, **env: str) -> str:
    """Run a command in a copy of the repository and return what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder) | env, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if fails or command[0] == "dvc" else "")


def environment(folder: Path) -> dict[str, str]:
    """Environment for commands in a copy: this Python and DVC, and the copy's own modules."""
    person = {"NAME": "Someone", "EMAIL": "someone@example.org"}
    return {
        **os.environ,
        **{f"GIT_{who}_{key}": x for who in ("AUTHOR", "COMMITTER") for key, x in person.items()},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "DVC_NO_ANALYTICS": "1",
    }
