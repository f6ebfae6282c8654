"""Stale stages: found in a clone without data, and none where nothing changed."""

import pytest
import yaml
from support import commit, load_script, run_in

from chest.core.errors import ChestError
from chest.reporting.staleness import PipelineError, stale_stages

PIPELINE = """
stages:
  prepare:
    cmd: python prepare.py
    deps:
      - data/raw
      - prepare.py
    params:
      - side
    outs:
      - data/prepared.txt
  model:
    foreach: ${models}
    do:
      cmd: python model.py ${key}
      deps:
        - data/prepared.txt
        - model.py
      params:
        - models.${key}
      outs:
        - data/predictions/${key}.txt
  evaluate:
    cmd: python evaluate.py
    deps:
      - data/predictions
      - evaluate.py
    outs:
      - metrics:
          cache: false
"""
DRAW = """
stages:
  draw:
    cmd: python draw.py
    deps:
      - draw.py
    outs:
      - raw
"""
WRITE = """
import sys
from pathlib import Path
path = Path({!r}.format(*sys.argv[1:]))
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text("content")
"""
FILES = {
    ".gitignore": "/data/raw/\n/data/prepared.txt\n/data/predictions/\n",
    "params.yaml": "side: 8\nmodels:\n  a:\n    lr: 1\n  b:\n    lr: 2\n",
    "dvc.yaml": PIPELINE,
    "data/dvc.yaml": DRAW,
    "data/draw.py": WRITE.format("raw/image.txt"),
    "prepare.py": WRITE.format("data/prepared.txt"),
    "model.py": WRITE.format("data/predictions/{}.txt"),
    "evaluate.py": WRITE.format("metrics/test.txt"),
}
EVERY = ["data/dvc.yaml:draw", "prepare", "model@a", "model@b", "evaluate"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Run the pipeline, and commit what Git tracks of it."""
    folder = tmp_path_factory.mktemp("origin")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    run_in(folder, "git", "init", "--quiet")
    run_in(folder, "dvc", "init", "--quiet")
    run_in(folder, "dvc", "repro", "--quiet")
    commit(folder)
    return folder


@pytest.fixture
def clone(origin, tmp_path, monkeypatch):
    run_in(tmp_path, "git", "clone", "--quiet", str(origin), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    assert not (tmp_path / "clone/data/raw").exists()
    return tmp_path / "clone"


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_clone_without_data_is_current(clone, capsys):
    load_script("tools/stale.py").main([])
    assert capsys.readouterr().out.startswith("No stage is stale")


def test_a_run_with_data_is_current(origin):
    assert stale_stages(origin) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "changed", "follow"),
    [
        ("params.yaml", "side: 8", "side: 9", ["prepare"], ["model@a", "model@b", "evaluate"]),
        ("params.yaml", "lr: 2", "lr: 3", ["model@b"], ["evaluate"]),
        ("params.yaml", "  b:", "  c:", ["model@c"], ["evaluate"]),
        ("params.yaml", "  b:\n    lr: 2\n", "", ["evaluate"], []),  # an output is gone
        ("model.py", "content", "text", ["model@a", "model@b"], ["evaluate"]),
        ("data/draw.py", "content", "text", EVERY[:1], EVERY[1:]),
        ("dvc.yaml", "python evaluate.py", "python -B evaluate.py", ["evaluate"], []),
        ("metrics/test.txt", "content", "nicer", ["evaluate"], []),
    ],
)
def test_a_change_makes_its_stages_stale_and_those_after_them(
    clone, file, old, new, changed, follow
):
    replace(clone / file, old, new)
    found = stale_stages()
    assert [stage.name for stage in found if stage.changed] == changed
    assert [stage.name for stage in found if not stage.changed] == follow


def test_a_script_that_is_gone_is_a_change(clone):
    (clone / "model.py").unlink()
    assert [stage.name for stage in stale_stages() if stage.changed] == ["model@a", "model@b"]


@pytest.mark.parametrize(
    ("stage", "changed"), [("prepare", ["model@a", "model@b"]), ("model@a", ["evaluate"])]
)
def test_an_output_that_the_next_stage_has_not_read_is_a_change(clone, stage, changed):
    lock = yaml.safe_load((clone / "dvc.lock").read_text())
    lock["stages"][stage]["outs"][0]["md5"] = 32 * "0"
    (clone / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert [stage.name for stage in stale_stages() if stage.changed] == changed


def test_annotations_stand_on_the_line_of_the_stage(clone, capsys):
    replace(clone / "data/draw.py", "content", "text")
    with pytest.raises(ChestError, match=r"dvc.yaml:12: model@a: follows data/dvc.yaml:draw"):
        load_script("tools/stale.py").main(["--annotate"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "::error file=data/dvc.yaml,line=3,title=data/dvc.yaml%3Adraw is stale::data/draw.py: mod"
    )
    assert lines[1].startswith("::warning file=dvc.yaml,line=3,title=prepare is stale::follows ")


def test_a_pipeline_that_dvc_cannot_read_is_an_error(clone):
    (clone / "dvc.yaml").write_text("stages: [")
    with pytest.raises(PipelineError, match=r"dvc\.yaml"):
        stale_stages()
