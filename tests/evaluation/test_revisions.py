"""metrics/answers.csv: compact, complete, and readable from any revision with Git alone."""

import numpy as np
import pandas as pd
import pytest
from made import constant_system, make_manifest, make_system
from support import commit, run_in

from chest.core.errors import InputError
from chest.evaluation.predictions import COLUMNS, write
from chest.evaluation.revisions import (
    ANSWERS,
    read_all,
    read_answers,
    read_tracked,
    resolve,
    write_answers,
)

LABELLED = make_manifest(8, splits=("train", "val", "test", "external"))
ANSWERED = ("val", "test", "external")
SYSTEM = make_system(LABELLED, key="a", splits=ANSWERED)
OTHER = constant_system(LABELLED, "normal", key="b", splits=("test",))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose first commit has the answers of SYSTEM as `a`, and the second others."""
    monkeypatch.chdir(tmp_path)
    run_in(tmp_path, "git", "init", "--quiet", "--initial-branch", "main")
    write_answers(ANSWERS, {"a": SYSTEM, "b": OTHER})
    commit(tmp_path)
    write_answers(ANSWERS, {"a": make_system(LABELLED, seed=1, splits=ANSWERED)})
    commit(tmp_path)
    return tmp_path


def test_what_is_written_is_read_from_a_revision(repository):
    found = read_answers("HEAD~1:a")
    expected = SYSTEM.answers[SYSTEM.answers["split"] != "val"].reset_index(drop=True)
    columns = ["image_id", "split", "actual", "predicted", "patient_id", "modality", "site"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])
    for label in ("covid19", "normal", "tuberculosis"):
        assert np.abs(found[label] - expected[label]).max() < 1.1e-4
    assert set(read_answers("HEAD~1:b")["split"]) == {"test"}
    assert {*read_tracked("HEAD~1")} == {"a", "b"}
    assert {*read_tracked()} == {"a"}
    assert not read_answers("a").equals(found)


def test_an_experiment_of_dvc_is_a_revision(repository):
    ref = f"refs/exps/12/{'3' * 38}/lively-newt"
    run_in(repository, "git", "update-ref", ref, "HEAD~1")
    assert resolve("lively-newt") == ref
    pd.testing.assert_frame_equal(read_answers("lively-newt:a"), read_answers("HEAD~1:a"))


def test_predictions_of_the_working_tree_come_first(repository, monkeypatch):
    monkeypatch.setattr("chest.evaluation.revisions.read_labelled", lambda: LABELLED)
    write("a", SYSTEM.answers[list(COLUMNS)], SYSTEM.record)
    pd.testing.assert_frame_equal(read_answers("a"), SYSTEM.answers)
    pd.testing.assert_frame_equal(read_answers("data/predictions/a.csv"), SYSTEM.answers)


def test_all_that_is_missing_is_listed(repository):
    with pytest.raises(InputError) as error:
        read_all("HEAD:b", "nowhere:a", "a", "file.csv")
    assert [str(problem.file) for problem in error.value.problems] == [
        "HEAD:b",
        "file.csv",
        f"nowhere:{ANSWERS}",
    ]


@pytest.mark.parametrize("damage", ["x", "9", ""])
def test_a_damaged_table_is_refused(repository, damage):
    lines = ANSWERS.read_text().splitlines()
    cells = lines[1].split(",")
    cells[-3 if damage == "x" else -2] = damage if damage != "9" else "99999"
    ANSWERS.write_text("\n".join([lines[0], ",".join(cells)]))
    with pytest.raises(InputError, match="as `evaluate` writes them"):
        read_answers("a")


def test_the_table_is_compact(tmp_path):
    # The study: some 1,600 images and ten systems in some 300 kB.
    labelled = make_manifest(400, images=1, splits=("test",))
    made = {f"system_{i}": make_system(labelled, 6, i, splits=("test",)) for i in range(10)}
    write_answers(tmp_path / "answers.csv", made)
    assert (tmp_path / "answers.csv").stat().st_size < 320_000
