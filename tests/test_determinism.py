"""The same bytes wherever and however the stages run (docs/determinism.md)."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, write_params
from test_ends import SMALL
from test_evaluate import make_answers

MODEL_STAGES = ("zeroshot_qwen", "zeroshot_siglip", "finetune_siglip", "probe_shortcuts")
DATA_STAGES = ("extract_slices", "build_manifest", "split", "audit", "floors")
# Runs stages in the working directory. Folders are listed in order or against it, and as many
# workers share the work as are given.
CHILD = """if True:
    import os, runpy, sys

    order, workers, umask, *scripts = sys.argv[1:]
    os.umask(int(umask, 8))
    os.sched_getaffinity = lambda _: set(range(int(workers)))
    scandir, listdir = os.scandir, os.listdir

    class Listed:
        def __init__(self, path="."):
            with scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=order == "reversed")
            self.entries = iter(found)
            self.close = self.entries.__length_hint__  # does nothing

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    os.scandir = Listed
    os.listdir = lambda path=".": sorted(listdir(path), reverse=order == "reversed")
    for script in scripts:
        sys.argv = [script]
        runpy.run_path(script, run_name="__main__")
"""
NO_RESULT = {"raw", "checkpoints", ".resume", "live"}
PLAIN = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TZ": "UTC"}
# A locale without UTF-8, as far as there is one everywhere.
STRANGE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "random",
           "TZ": "Pacific/Kiritimati", "OMP_NUM_THREADS": "2", "COLUMNS": "40"}  # fmt: skip


def start(folder: Path, stages: tuple[str, ...], env: dict[str, str], *how: str):
    """Begin to run `stages` in `folder`; `how`: order, workers, umask."""
    scripts = [str(ROOT / "stages" / f"{stage}.py") for stage in stages]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *how, *scripts], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def written(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of all that is in `folder` but the collections and locks."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not NO_RESULT & {*path.relative_to(folder).parts}
    }


def twice(plain: Path, strange: Path, stages: tuple[str, ...], **same: str) -> dict[str, str]:
    """Run `stages` in both folders, in surroundings as unlike as can be; what they wrote is alike.

    `same`: what of the environment is the same for both. Returns {file: SHA-256}.
    """
    runs = [
        start(plain, stages, PLAIN | same, "sorted", "1", "022"),
        start(strange, stages, STRANGE | same, "reversed", "3", "077"),
    ]
    for run in runs:
        _, told = run.communicate()
        assert run.returncode == 0, told
    first, second = written(plain), written(strange)
    assert set(first) == set(second)
    assert [name for name in sorted(first) if first[name] != second[name]] == []
    return first


@pytest.fixture
def folders(tmp_path):
    plain, strange = tmp_path / "plain", tmp_path / "Lungen  – 肺 'n' $HOME"
    plain.mkdir()
    strange.mkdir()
    return plain, strange


def test_the_data_stages_give_the_same_bytes_in_other_surroundings(phantoms, folders):
    for folder in folders:
        shutil.copytree(phantoms, folder / "data/raw/phantom")
        write_params(folder, **{"phantom.expected_counts": None})
    names = twice(*folders, DATA_STAGES)
    assert {"data/manifest.csv", "data/images.npy", "data/split.csv", "data/slices/index.csv",
            "data/audit/near_duplicates.csv",
            "data/predictions/floor_site.csv"} <= set(names)  # fmt: skip
    assert any(name.startswith("data/slices/study_") for name in names)


def test_the_stages_with_models_give_the_same_bytes_in_other_surroundings(
    phantoms, checkpoints, folders
):
    for folder in folders:
        shutil.copytree(phantoms, folder / "data/raw/phantom")
        shutil.copytree(checkpoints, folder / "data/checkpoints/phantom")
        write_params(folder, **SMALL)
    names = twice(*folders, (*DATA_STAGES[:3], *MODEL_STAGES), OMP_NUM_THREADS="1")
    for stage in MODEL_STAGES[:3]:
        assert {f"data/predictions/{stage}.csv", f"data/predictions/{stage}.json"} <= set(names)
    assert {"models/finetune_siglip/model.safetensors", "data/training/finetune_siglip.csv",
            "data/predictions/probes/border_only.csv"} <= set(names)  # fmt: skip


def test_metrics_and_charts_are_the_same_bytes_in_other_surroundings(folders, monkeypatch):
    for folder in folders:
        monkeypatch.chdir(folder)
        make_answers(folder)
    names = twice(*folders, ("evaluate",))
    for kind in ("metrics/*.json", "metrics/*.md", "plots/*.csv", "plots/*.png", "plots/sheets/*"):
        assert [name for name in names if Path(name).match(kind)], kind
