"""The stage: what it writes, and that an interrupted training resumes to the same bytes."""

import json
import math
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from case import OUTPUTS, SYSTEM, outputs, write_case
from processes import exit_code, forked
from support import run_stage

from chest.evaluation.predictions import read_system
from chest.models.common.checkpoints import find_checkpoint
from chest.models.encoders import load_trained
from chest.training import finetuning, loop

FOLDER = Path(".resume") / SYSTEM


@pytest.fixture
def case(checkpoint, tmp_path, monkeypatch):
    """A folder with the same inputs, as working directory."""
    monkeypatch.chdir(write_case(tmp_path, checkpoint))
    return tmp_path


def states(folder=Path()):
    return [int(path.stem.removeprefix("step-")) for path in sorted((folder / FOLDER).iterdir())]


def strike(monkeypatch, module, function, call, *signals):
    """Raise signals in the `call`-th call of a function."""
    plain, calls = getattr(module, function), []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == call:
            for number in signals:
                signal.raise_signal(number)
        return plain(*arguments)

    monkeypatch.setattr(module, function, struck)
    return lambda: monkeypatch.setattr(module, function, plain)


def interrupted(capsys):
    """Run the stage, which a signal ends; return exit code and message."""
    with pytest.raises(SystemExit) as end:
        run_stage(SYSTEM)
    return end.value.code, capsys.readouterr().err


# --- What is written -------------------------------------------------------------------------


def test_predictions_model_curve_and_record_agree(peaceful, monkeypatch):
    monkeypatch.chdir(peaceful)
    labelled = pd.read_csv("data/manifest.csv", dtype=str).merge(pd.read_csv("data/split.csv"))
    system = read_system(SYSTEM, labelled)
    assert system.splits == {"val", "test", "external"}
    record, curve = system.record, pd.read_csv(f"data/training/{SYSTEM}.csv")
    assert (record.name, record.kind, record.n) == ("SigLIP, fine-tuned", "trained", 28)
    assert (record.weights, record.precision) == ("random", "fp64")
    assert {*record.details} >= {"trained_on", "best_epoch", "select_by", "temperature"}
    assert record.details["trained_on"] == 36
    best = curve.iloc[record.details["best_epoch"] - 1]
    validation = system.of("val")
    right = validation["actual"] == validation["predicted"]
    assert right.mean() == pytest.approx(best["val_war"], abs=1e-5)
    model = load_trained(find_checkpoint(f"models/{SYSTEM}", "main"))
    assert model.config.num_labels == 3
    assert not FOLDER.exists()
    assert Path("live/metrics.json").exists()


def test_calibration_lowers_the_validation_loss_and_changes_no_answer(
    case, peaceful, checkpoint, monkeypatch
):
    plain = case / "plain"
    plain.mkdir()
    monkeypatch.chdir(write_case(plain, checkpoint, calibrate="none"))
    run_stage(SYSTEM)
    tables = [
        pd.read_csv(folder / OUTPUTS[0]).query("split == 'val'") for folder in (plain, peaceful)
    ]
    before, after = (
        -sum(math.log(max(row[row["actual"]], 1e-6)) for _, row in table.iterrows())
        for table in tables
    )
    assert after < before
    assert tables[0]["predicted"].equals(tables[1]["predicted"])


# --- Interrupted -----------------------------------------------------------------------------


@forked
def test_kill_and_resume_gives_the_same_bytes(case, peaceful, monkeypatch, capsys):
    undo = strike(monkeypatch, loop, "train_step", 11, signal.SIGKILL)
    assert exit_code(lambda: run_stage(SYSTEM)) == -signal.SIGKILL
    undo()
    assert states() == [4, 8]
    assert not any(Path(name).exists() for name in OUTPUTS)
    run_stage(SYSTEM)
    assert "Resuming after step 8 of 18" in capsys.readouterr().out
    assert outputs(case) == outputs(peaceful)
    assert not FOLDER.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_it_came_in(case, peaceful, monkeypatch, capsys, number, code):
    undo = strike(monkeypatch, loop, "train_step", 7, number)
    assert interrupted(capsys) == (code, "Interrupted.\nResumes after step 7 of 18.\n")
    undo()
    run_stage(SYSTEM)
    assert "Resuming after step 7 of 18" in capsys.readouterr().out
    assert outputs(case) == outputs(peaceful)


def test_a_signal_during_the_last_validation_saves_the_whole_training(
    case, peaceful, monkeypatch, capsys
):
    undo = strike(monkeypatch, loop, "finish_epoch", 3, signal.SIGTERM)
    assert interrupted(capsys) == (143, "Interrupted.\nResumes after step 18 of 18.\n")
    undo()
    monkeypatch.setattr(loop, "train_step", None)  # not one step more
    run_stage(SYSTEM)
    assert outputs(case) == outputs(peaceful)


def test_a_second_signal_ends_at_once_with_the_last_saved_state(case, monkeypatch, capsys):
    strike(monkeypatch, loop, "train_step", 6, signal.SIGINT, signal.SIGINT)
    assert interrupted(capsys) == (130, "Interrupted.\nResumes after step 4 of 18.\n")
    assert states() == [4]


def test_an_interrupted_calibration_does_not_train_again(case, peaceful, monkeypatch, capsys):
    undo = strike(monkeypatch, finetuning, "fit_temperature", 1, signal.SIGTERM)
    code, message = interrupted(capsys)
    assert (code, "resumes with the calibration" in message) == (143, True)
    undo()
    monkeypatch.setattr(loop, "train_step", None)
    run_stage(SYSTEM)
    assert outputs(case) == outputs(peaceful)


# --- States that are not resumed from --------------------------------------------------------


def test_other_parameters_start_over_and_replace_the_states(case, checkpoint, monkeypatch, capsys):
    strike(monkeypatch, loop, "train_step", 13, signal.SIGTERM)
    interrupted(capsys)
    assert states() == [12, 13]
    write_params_again(case, checkpoint, lr=5e-4)
    strike(monkeypatch, loop, "train_step", 9, signal.SIGTERM)
    _, message = interrupted(capsys)
    skipped = f"{FOLDER}/step-00000013.safetensors: not resumed from, changed since: parameters\n"
    assert skipped in message
    assert message.endswith("Resumes after step 9 of 18.\n")
    assert states() == [8, 9]


def write_params_again(folder, checkpoint, **changes):
    other = folder / "other"
    other.mkdir()
    write_case(other, checkpoint, **changes)
    (other / "params.yaml").replace(folder / "params.yaml")


def test_a_torn_state_is_passed_over_for_the_one_before_it(case, peaceful, monkeypatch, capsys):
    undo = strike(monkeypatch, loop, "train_step", 10, signal.SIGTERM)
    interrupted(capsys)
    undo()
    newest = FOLDER / "step-00000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    run_stage(SYSTEM)
    output = capsys.readouterr()
    assert f"{newest}: not resumed from, cannot be read" in output.err
    assert "Resuming after step 8 of 18" in output.out
    assert outputs(case) == outputs(peaceful)


def test_dropout_resumes_too(checkpoint, tmp_path, monkeypatch, capsys):
    # The general random generator is part of the state.
    dropping = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = json.loads((dropping / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.3
    (dropping / "config.json").write_text(json.dumps(config))
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(write_case(tmp_path / name, dropping))
        if name == "resumed":
            undo = strike(monkeypatch, loop, "train_step", 7, signal.SIGTERM)
            interrupted(capsys)
            undo()
        run_stage(SYSTEM)
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "resumed")
