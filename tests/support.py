"""What several tests share: where things lie, and how a stage is run as a user runs it."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType

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


def run_stage(name: str) -> None:
    """Run a stage in the working directory, as `python stages/<name>.py` does."""
    runpy.run_path(str(ROOT / "stages" / f"{name}.py"), run_name="__main__")


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
