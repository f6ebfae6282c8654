"""The predictions format: what is written is read again, and what does not fit is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made import make_manifest, make_system
from support import run_in

from chest.core.errors import InputError
from chest.evaluation.predictions import (
    COLUMNS,
    CURVE_COLUMNS,
    FOLDER,
    Record,
    read_curve,
    read_system,
    read_systems,
    tabulate,
    write,
)

LABELLED = make_manifest(patients=2)
TEST = LABELLED[LABELLED["split"] == "test"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_system("s")


def write_system(key, **record):
    system = make_system(LABELLED, key=key)
    made_by = Record(**{"name": "A system", "kind": "trained", "n": len(system.answers), **record})
    write(key, system.answers[list(COLUMNS)], made_by)
    return FOLDER / f"{key}.csv"


def test_the_prediction_is_that_of_the_rounded_probabilities():
    near = np.array([[0.4, 0.4000001, 0.1999999], [1 / 3, 1 / 3, 1 / 3]])
    table = tabulate(TEST[:2], [*near])
    assert tuple(table.columns) == COLUMNS
    assert list(table["predicted"]) == ["covid19", "covid19"]
    assert table["covid19"][1] == 0.333333


def test_an_answer_without_a_class_is_unparsed():
    assert list(tabulate(TEST[:2], [None, (0.1, 0.8, 0.1)])["predicted"]) == ["unparsed", "normal"]


def test_probabilities_that_are_not_finite_are_no_answer():
    with pytest.raises(InputError, match=r"not finite \(1 of 2 images"):
        tabulate(TEST[:2], [(np.nan, 0, 1), (1, 0, 0)])


def test_what_is_written_is_read_with_patient_and_site(written):
    system = read_system("s", LABELLED)
    expected = make_system(LABELLED)
    pd.testing.assert_frame_equal(system.answers, expected.answers)
    assert system.splits == {"val", "test"}
    assert len(system.of("test")) == len(TEST)


def test_systems_are_sorted_by_kind_and_random_weights_show(written):
    write_system("b", kind="blind")
    write_system("z", kind="zero-shot", weights="random")
    write_system("a", kind="trained", weights="random")
    systems = read_systems(LABELLED)
    assert [*systems] == ["a", "s", "z", "b"]
    assert systems["z"].name == "A system (random weights)"
    assert systems["a"].name == "A system (trained from random weights)"
    assert systems["b"].name == "A system"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], "31 answers"),  # torn
        (lambda t: t[::-1], "another image_id"),
        (lambda t: t.assign(image_id="x" + t["image_id"]), "another image_id"),  # of other data
        (lambda t: t.assign(actual="normal"), "another actual"),
        (lambda t: t.assign(covid19="0.9"), "sum to 1"),
        (lambda t: t.assign(covid19="nan"), "from 0 to 1"),
        (lambda t: t.assign(predicted="tuberculosis"), "most probable class"),
        (lambda t: t.drop(columns="normal"), "columns"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(written, change, message):
    change(pd.read_csv(written, dtype=str)).to_csv(written, index=False)
    with pytest.raises(InputError, match=message):
        read_systems(LABELLED)


@pytest.mark.parametrize(
    "change", [{"n": 1}, {"kind": "oracle"}, {"name": "<b>"}, {"colour": "red"}]
)
def test_a_record_that_does_not_fit_is_refused(written, change):
    path = written.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"s\.json"):
        read_systems(LABELLED)


def test_a_curve_needs_the_kept_epoch(written):
    curve = Path("data/training/s.csv")
    assert read_curve(read_system("s", LABELLED)) is None
    curve.parent.mkdir()
    pd.DataFrame([[1, *[0.5] * 7], [2, *[0.4] * 7]], columns=CURVE_COLUMNS).to_csv(
        curve, index=False
    )
    assert list(read_curve(read_system("s", LABELLED))["epoch"]) == [1, 2]
    write_system("s", details={"best_epoch": 3})
    with pytest.raises(InputError, match="kept epoch 3"):
        read_curve(read_system("s", LABELLED))


def test_predictions_of_a_stage_that_is_gone_are_refused(tmp_path, monkeypatch):
    stage = "stages:\n  one:\n    cmd: 'true'\n    outs:\n    - data/predictions/kept.csv\n"
    (tmp_path / "dvc.yaml").write_text(stage)
    run_in(tmp_path, "git", "init", "--quiet")
    run_in(tmp_path, "dvc", "init", "--quiet")
    monkeypatch.chdir(tmp_path)
    write_system("kept")
    assert [*read_systems(LABELLED)] == ["kept"]
    write_system("gone")
    with pytest.raises(InputError, match=r"gone\.csv\n.*no stage"):
        read_systems(LABELLED)
