"""Stale stages, named by a clone without data."""

import shutil

import pytest
from support import load_script, make_pipeline, run_in

from chest.errors import ChestError
from chest.staleness import PipelineError, StaleStage, stale_stages

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # in DVC
FILES = {
    ".gitignore": "/data/drawn/\n/data/real/*\n/data/*.txt\n",
    "params.yaml": "profile: drawn\nseed: 1\ndrawn:\n  lr: 0.1\nreal:\n  lr: 0.1\n",
    "cut.txt": "how to cut\n",
    "train.txt": "how to train\n",
    "score.txt": "how to score\n",
    "data/dvc.yaml": """\
stages:
  draw:
    cmd: mkdir -p drawn && echo image > drawn/a.png
    outs:
      - drawn
""",
    "dvc.yaml": """\
# A comment, so that line 1 is no stage.
stages:
  cut:
    cmd: cat cut.txt > data/cut.txt
    deps:
      - data/${profile}
      - cut.txt
    outs:
      - data/cut.txt

  train:
    cmd: cat train.txt > data/model.txt
    deps:
      - data/cut.txt
      - train.txt
    params:
      - seed
      - ${profile}.lr
    outs:
      - data/model.txt

  score:
    cmd: cat score.txt > metrics.txt
    deps:
      - data/model.txt
      - score.txt
    outs:
      - metrics.txt:
          cache: false
""",
}
CUT, TRAIN, SCORE = 3, 11, 22  # the lines on which they begin


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A small pipeline that `dvc repro` ran, and whose results are committed."""
    return make_pipeline(tmp_path_factory.mktemp("committed"), FILES)


@pytest.fixture
def clone(committed, tmp_path):
    """A clone of it, without data."""
    folder = tmp_path / "clone"
    run_in(tmp_path, "git", "clone", "--quiet", str(committed), str(folder))
    assert not (folder / "data/model.txt").exists()
    return folder


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def reasons(folder):
    """{stage: its own reasons}; stages that are only after others have none."""
    return {stage.name: stage.reasons for stage in stale_stages(folder)}


def test_nothing_is_stale_after_a_run_with_and_without_data(committed, clone):
    assert stale_stages(committed) == []
    assert stale_stages(clone) == []


def test_changed_code_makes_its_stage_and_all_after_it_stale(clone):
    change(clone / "train.txt", "train", "train better")
    train, score = stale_stages(clone)
    assert (train.name, train.file, train.line) == ("train", "dvc.yaml", TRAIN)
    assert train.reasons == ("train.txt has changed",)
    assert train.after == ()
    assert (score.name, score.line, score.reasons) == ("score", SCORE, ())
    assert score.after == ("train",)
    assert score.why == "comes after train"


def test_every_stale_stage_is_named_not_only_the_first(clone):
    # `dvc repro --dry --allow-missing` ends at `cut`, whose input it would need.
    for name in ("cut", "train", "score"):
        change(clone / f"{name}.txt", "how", "How")
    assert list(reasons(clone)) == ["cut", "train", "score"]
    assert all(reasons(clone).values())


def test_a_changed_parameter_is_named(clone):
    change(clone / "params.yaml", "seed: 1", "seed: 2")
    assert reasons(clone) == {"train": ("seed in params.yaml has changed",), "score": ()}


def test_a_parameter_that_no_stage_tracks_is_nothing(clone):
    change(clone / "params.yaml", "real:\n  lr: 0.1", "real:\n  lr: 0.2")
    assert reasons(clone) == {}


def test_a_changed_command_is_named(clone):
    change(clone / "dvc.yaml", "cat train.txt >", "cat train.txt train.txt >")
    assert reasons(clone)["train"] == ("its command has changed",)


def test_a_result_that_was_edited_by_hand_is_named(clone):
    (clone / "metrics.txt").write_text("how to score better\n")
    assert reasons(clone) == {"score": ("metrics.txt has changed",)}
    (clone / "metrics.txt").unlink()
    assert reasons(clone) == {"score": ("metrics.txt is missing",)}


def test_a_missing_code_file_is_named(clone):
    (clone / "cut.txt").unlink()
    assert reasons(clone)["cut"] == ("cut.txt is missing",)


def test_results_of_another_run_upstream_are_named(clone):
    # Someone ran and committed `train` alone.
    lock = (clone / "dvc.lock").read_text()
    cut = lock.index("data/cut.txt", lock.index("outs:"))
    md5 = lock.index("md5: ", cut) + len("md5: ")
    md5 = lock.index("md5: ", md5) + len("md5: ")  # the first is `hash: md5`
    (clone / "dvc.lock").write_text(f"{lock[:md5]}{'ab' * 16}{lock[md5 + 32 :]}")
    assert reasons(clone) == {
        "train": ("data/cut.txt is not the one that cut wrote",),
        "score": (),
    }


def test_many_reasons_are_told_in_one_line():
    stage = StaleStage("train", "dvc.yaml", TRAIN, tuple("abcdefg"), ("cut",))
    assert stage.why == "a; b; c; d; e; and 2 more"


def test_a_stage_that_never_ran_says_so_in_one_line(clone):
    (clone / "dvc.lock").unlink()
    assert set(reasons(clone).values()) == {("none of its outputs is in dvc.lock",)}


def test_a_dependency_that_was_added_is_named(clone):
    change(clone / "dvc.yaml", "      - train.txt\n", "      - train.txt\n      - cut.txt\n")
    assert reasons(clone)["train"] == ("cut.txt is not in dvc.lock",)


def test_another_profile_is_another_run(clone):
    change(clone / "params.yaml", "profile: drawn", "profile: real")
    assert reasons(clone)["cut"] == ("data/real is not in dvc.lock",)
    assert reasons(clone)["train"] == ("real.lr in params.yaml is not in dvc.lock",)


def test_data_that_no_stage_makes_and_git_ignores_are_not_missed(clone):
    # As after a run of the study: its images are on another machine.
    change(clone / "params.yaml", "profile: drawn", "profile: real")
    change(clone / "dvc.lock", "drawn", "real")
    assert reasons(clone) == {}
    (clone / "data/real").mkdir()
    (clone / "data/real/other.png").touch()
    assert reasons(clone) == {}


def test_a_stage_in_a_folder_is_named_as_dvc_does(clone):
    change(clone / "data/dvc.yaml", "echo image", "echo picture")
    draw = stale_stages(clone)[0]
    assert (draw.name, draw.file, draw.line) == ("data/dvc.yaml:draw", "data/dvc.yaml", 2)
    assert reasons(clone) == {draw.name: draw.reasons, "cut": (), "train": (), "score": ()}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dvc.yaml", "stages:", "stage:"),
        ("dvc.yaml", "deps:", "deps: ["),
        ("dvc.lock", "schema:", "sch:"),
        ("params.yaml", "profile: drawn", ""),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_an_error(clone, name, old, new):
    change(clone / name, old, new)
    with pytest.raises(PipelineError, match="DVC cannot read the pipeline"):
        stale_stages(clone)


def test_a_folder_without_a_pipeline_is_an_error(clone, tmp_path):
    with pytest.raises(PipelineError):
        stale_stages(tmp_path)
    (clone / "dvc.yaml").unlink()
    shutil.rmtree(clone / "data")
    with pytest.raises(PipelineError, match="no stage"):
        stale_stages(clone)


# --- tools/stale.py --------------------------------------------------------------------------


def test_the_tool_names_file_line_and_reason(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    stale = load_script("tools/stale.py")
    stale.main([])
    assert "No stage is stale" in capsys.readouterr().out
    change(clone / "score.txt", "score", "score better")
    with pytest.raises(ChestError, match=f"dvc.yaml:{SCORE}: score: score.txt has changed"):
        stale.main([])


def test_the_annotations_are_workflow_commands(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    stale = load_script("tools/stale.py")
    change(clone / "data/dvc.yaml", "echo image", "echo picture")
    with pytest.raises(stale.StaleError):
        stale.main(["--annotate"])
    lines = capsys.readouterr().out.splitlines()
    place = "file=data/dvc.yaml,line=2,title=data/dvc.yaml%3Adraw is stale"
    assert lines[0].startswith(f"::error {place}::its command has changed. Run")
    assert lines[1].startswith(
        f"::warning file=dvc.yaml,line={CUT},title=cut is stale::comes after"
    )
    assert stale.escape("100 %\nof") == "100 %25%0Aof"
