"""Work that was done is taken up again, bit for bit, and only where it belongs."""

import json
import os
import signal
import sys
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from support import run_stage, write_params
from test_training import LIGHT, data, settings  # noqa: F401

from chest import calibration, resume, training
from chest.answering import answer, in_batches
from chest.compute import find_checkpoint, load_normalization, start
from chest.errors import ChestError
from chest.predictions import CURVE_COLUMNS
from chest.resident import Images, place_images
from chest.resume import States, differences, open_journal, origin_of
from chest.running import Interrupted, alone, ending_on_signals
from chest.siglip import load_classifier
from chest.training import Task, train

ORIGIN = {"parameters": "1", "images": "2", "split": "3", "code": "4"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Training --------------------------------------------------------------------------------


class Ends(Exception):
    """As a crash: nothing is saved on the way out."""


def learn(checkpoints, data, states=None, crash_at=None, origin=ORIGIN, **changes):  # noqa: F811
    """Train on made images; returns curve, best epoch and weights. May crash at a step."""
    accelerator = start(5)
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    model = load_classifier(source, 224)
    images = place_images(data.images, accelerator.device)
    chosen = settings(**{"epochs": 4, "augment": LIGHT, "save_every": 2, **changes})
    task = Task(accelerator, model, data, images, load_normalization(source), chosen)
    logged, steps = [], iter(range(1, 10**6))

    def count(module, inputs):
        if module.training and next(steps) == crash_at:
            raise Ends

    model.register_forward_pre_hook(count)
    try:
        curve, best = train(task, 5, logged.append, states and States("x", origin))
    except Ends:
        return None
    return curve, best, model.state_dict(), logged


def same(one, other):
    return (
        one[0].equals(other[0])
        and one[1] == other[1]
        and all(torch.equal(one[2][name], other[2][name]) for name in one[2])
    )


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4, 7, 12])
def test_a_training_goes_on_bit_for_bit(checkpoints, data, crash_at, capsys):  # noqa: F811
    # 3 steps an epoch, a state every 2: in an epoch, at its end, and before there is any.
    peaceful = learn(checkpoints, data)
    assert learn(checkpoints, data, states=True, crash_at=crash_at) is None
    resumed = learn(checkpoints, data, states=True)
    assert same(peaceful, resumed)
    assert pd.DataFrame(resumed[3])[list(CURVE_COLUMNS)].equals(resumed[0])  # the curve is whole
    done = 2 * ((crash_at - 1) // 2)
    assert (f"Going on after step {done} of 12" in capsys.readouterr().out) == (done > 0)


def test_a_training_that_crashes_again_and_again_comes_to_the_same_end(checkpoints, data):  # noqa: F811
    for _ in range(4):
        assert learn(checkpoints, data, states=True, crash_at=3) is None
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True, crash_at=5))


@pytest.mark.parametrize("name", ORIGIN)
def test_a_state_of_another_origin_is_not_taken_up(checkpoints, data, name, capsys):  # noqa: F811
    assert learn(checkpoints, data, states=True, crash_at=8) is None
    other = {**ORIGIN, name: "other"}
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True, origin=other))
    output = capsys.readouterr()
    assert f"it comes from a run with other {name}\n" in output.err
    assert "Going on" not in output.out


def damage(file, how):
    content = file.read_bytes()
    file.write_bytes({
        "torn": content[: len(content) // 2],
        "empty": b"",
        "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "foreign": b'{"origin": [1], "values": 3}',
    }[how])  # fmt: skip


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["torn", "empty", "flipped", "foreign"])
def test_a_damaged_state_is_set_aside_and_the_one_before_it_used(
    checkpoints, data, here, name, how, capsys  # noqa: F811
):  # fmt: skip
    assert learn(checkpoints, data, states=True, crash_at=8) is None
    before, last = sorted((here / ".resume/x").iterdir())
    assert (before.name, last.name) == ("step-00000004", "step-00000006")
    damage(last / name, how)
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True))
    output = capsys.readouterr()
    assert f"{last.relative_to(here)} is not taken up: it is damaged" in output.err
    assert "Going on after step 4 of 12" in output.out
    assert last.with_name(last.name + ".aside").is_dir()


def test_only_the_last_two_states_are_kept_and_none_when_it_is_done(checkpoints, data, here):  # noqa: F811
    assert learn(checkpoints, data, states=True, crash_at=12, save_every=1) is None
    assert [p.name for p in sorted((here / ".resume/x").iterdir())] == [
        "step-00000010", "step-00000011",
    ]  # fmt: skip
    States("x", ORIGIN).clear()
    assert not (here / ".resume/x").exists()


def test_a_signal_has_the_state_kept_at_that_step(checkpoints, data, monkeypatch):  # noqa: F811
    classify, calls = training.classify, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return classify(*arguments)

    monkeypatch.setattr(training, "classify", struck)
    with pytest.raises(Interrupted, match="goes on after step 5 of 12") as end:
        learn(checkpoints, data, states=True, save_every=1000)
    assert end.value.signal == signal.SIGTERM
    monkeypatch.setattr(training, "classify", classify)
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True, save_every=1000))


def goes_on_after(step, checkpoints, data, capsys):  # noqa: F811
    """Whether the next run goes on after `step` of 12, and comes to a peaceful run's end."""
    capsys.readouterr()
    resumed = learn(checkpoints, data, states=True, save_every=1000)
    assert f"Going on after step {step} of 12" in capsys.readouterr().out
    return same(learn(checkpoints, data), resumed)


@pytest.mark.parametrize(("function", "call", "step"), [
    ("validate", 2, 6), ("finish_epoch", 2, 6), ("draw_epoch", 3, 6), ("draw_epoch_changes", 3, 6),
    ("finish_epoch", 4, 12),
])  # fmt: skip
def test_a_signal_between_steps_has_the_state_kept_too(
    checkpoints, data, monkeypatch, capsys, function, call, step  # noqa: F811
):  # fmt: skip
    plain, calls = getattr(training, function), []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(training, function, struck)
    with ending_on_signals(), pytest.raises(Interrupted, match=f"after step {step} of 12") as end:
        learn(checkpoints, data, states=True, save_every=1000)
    assert end.value.signal == signal.SIGTERM
    monkeypatch.setattr(training, function, plain)
    assert goes_on_after(step, checkpoints, data, capsys)


def test_a_step_that_is_broken_off_is_not_kept(checkpoints, data, monkeypatch, here):  # noqa: F811
    classify, calls = training.classify, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the second one ends it at once
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return classify(*arguments)

    monkeypatch.setattr(training, "classify", struck)
    with pytest.raises(Interrupted, match="goes on after step 4 of 12"):
        learn(checkpoints, data, states=True)
    assert [p.name for p in sorted((here / ".resume/x").iterdir())][-1] == "step-00000004"


def test_a_training_that_is_done_is_not_done_again(checkpoints, data, monkeypatch, capsys):  # noqa: F811
    first = learn(checkpoints, data, states=True, save_every=1000)
    monkeypatch.setattr(training, "classify", None)  # not a step more
    capsys.readouterr()
    assert same(first, learn(checkpoints, data, states=True, save_every=1000))
    assert "Going on after step 12 of 12" in capsys.readouterr().out


def test_what_draws_from_the_general_generator_goes_on_bit_for_bit(
    checkpoints, data, monkeypatch  # noqa: F811
):  # fmt: skip
    load = load_classifier

    def with_dropout(*arguments):
        model = load(*arguments)
        model.classifier = torch.nn.Sequential(torch.nn.Dropout(0.3), model.classifier)
        return model

    plain = learn(checkpoints, data)
    monkeypatch.setattr(sys.modules[__name__], "load_classifier", with_dropout)
    peaceful = learn(checkpoints, data)
    assert not peaceful[0].equals(plain[0])
    assert learn(checkpoints, data, states=True, crash_at=6) is None
    assert same(peaceful, learn(checkpoints, data, states=True))


def other_step(content):
    content["values"]["step"] -= 1


def other_best(content):
    content["values"]["best"][0] = 2.0


def other_rate(content):
    content["values"]["groups"][0]["lr"] = 1.0


def no_values(content):
    content["values"] = {}


def no_curve(content):
    content["values"]["curve"] = "x"


@pytest.mark.parametrize(("change", "sealed"), [
    (other_step, False), (other_best, False), (other_rate, False), (no_values, False),
    (no_curve, False), (no_values, True),
])  # fmt: skip
def test_a_state_that_was_changed_is_set_aside(
    checkpoints, data, here, change, sealed, capsys  # noqa: F811
):  # fmt: skip
    assert learn(checkpoints, data, states=True, crash_at=8) is None
    last = sorted((here / ".resume/x").iterdir())[-1]
    content = json.loads((last / "state.json").read_text())
    change(content)
    if sealed:
        del content["digest"]
        digest = resume._seal(last / "state.safetensors", content)
        content = {"digest": digest, **content}
    (last / "state.json").write_text(json.dumps(content))
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True))
    output = capsys.readouterr()
    assert f"{last.relative_to(here)} is not taken up: it is damaged" in output.err
    assert "Going on after step 4 of 12" in output.out


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["pipe", "deep"])
def test_a_state_that_is_no_file_at_all_is_set_aside(
    checkpoints, data, here, how, name, capsys  # noqa: F811
):  # fmt: skip
    assert learn(checkpoints, data, states=True, crash_at=5) is None
    for state in (here / ".resume/x").iterdir():
        (state / name).unlink()
        if how == "pipe":
            os.mkfifo(state / name)
        else:
            (state / name).write_text("[" * 100_000)
    assert same(learn(checkpoints, data), learn(checkpoints, data, states=True))
    assert capsys.readouterr().err.count("is not taken up: it is damaged") == 2


# --- Answers ---------------------------------------------------------------------------------


def ask(journal, crash_at=None, rows=20, size=4):
    """Answer rows with ten times their number, in batches; returns answers and what was asked."""
    asked = []

    def say(batch):
        if len(asked) == crash_at:
            raise Ends
        asked.append(batch.tolist())
        return [[row * 10.0, 1 / 3] if row % 7 else None for row in batch.tolist()]

    try:
        return answer(start(0), in_batches(np.arange(rows), size), say, journal), asked
    except Ends:
        return None, asked


EXPECTED = {row: [row * 10.0, 1 / 3] if row % 7 else None for row in range(20)}


@pytest.mark.parametrize("crash_at", range(5))
def test_no_image_is_asked_twice_and_none_left_out(crash_at):
    _, first = ask(open_journal(start(0), "x", ORIGIN), crash_at)
    answers, then = ask(open_journal(start(0), "x", ORIGIN))
    assert answers == EXPECTED
    assert first + then == [list(range(i, i + 4)) for i in range(0, 20, 4)]


def test_a_torn_line_does_not_count(here):
    journal = open_journal(start(0), "x", ORIGIN)
    ask(journal, 3)
    (file,) = here.glob(".resume/x/answers-*.jsonl")
    for tail in ("[[3, [1", "[[3, [1.0, 2.0]]]\x00\x00", "{}", "[[null, 1]]", "[3]", '{"a": 1}'):
        whole = file.read_text()
        file.write_text(whole[:-9] + "\n" + tail)
        answers, then = ask(open_journal(start(0), "x", ORIGIN))
        assert answers == EXPECTED, tail
        assert [8, 9, 10, 11] in then  # the batch of the torn line
        file.write_text(whole)


@pytest.mark.parametrize("text", [
    "[[0, [0.2, 0.2]]]", "[[0, [NaN, 0]]]", "[[0, null]]", '[[0, "x"]]', "[[0, [1, 2]]]",
    "[[1e400, null]]", "[" * 100_000, "[[0, [0.2, 0.2]]] ", "\x85", "\udcff",
])  # fmt: skip
def test_a_line_that_was_changed_does_not_count(here, text):
    journal = open_journal(start(0), "x", ORIGIN)
    ask(journal, 3)
    (file,) = here.glob(".resume/x/answers-*.jsonl")
    whole = file.read_text()
    digest = whole.split()[0]
    for line in (text, f"{digest} {text}"):
        file.write_text(f"{whole}\n{line}\n", errors="surrogateescape")
        assert journal.answers() == {row: EXPECTED[row] for row in range(12)}


def test_a_changed_answer_is_asked_anew(here):
    ask(open_journal(start(0), "x", ORIGIN), 3)
    (file,) = here.glob(".resume/x/answers-*.jsonl")
    file.write_text(file.read_text().replace("[10.0, ", "[11.0, "))
    answers, then = ask(open_journal(start(0), "x", ORIGIN))
    assert answers == EXPECTED
    assert then == [[0, 1, 2, 3], [12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize("name", ["origin.json", "answers-0.jsonl", "answers-1.jsonl"])
@pytest.mark.parametrize("how", ["pipe", "link"])
def test_a_journal_that_is_no_file_is_emptied(here, how, name):
    ask(open_journal(start(0), "x", ORIGIN), 3)
    path = here / ".resume/x" / name
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    else:
        (here / "target").write_text("kept")
        path.symlink_to(here / "target")
    answers, then = ask(open_journal(start(0), "x", ORIGIN))
    assert answers == EXPECTED
    assert len(then) == 5
    assert how == "pipe" or (here / "target").read_text() == "kept"


def test_an_origin_too_deep_is_no_origin(here):
    ask(open_journal(start(0), "x", ORIGIN), 3)
    (here / ".resume/x/origin.json").write_text("[" * 100_000)
    assert len(ask(open_journal(start(0), "x", ORIGIN))[1]) == 5


@pytest.fixture(scope="module")
def cut(phantoms, checkpoints, tmp_path_factory):
    """A working directory with few phantoms, cut and split."""
    folder = tmp_path_factory.mktemp("asked")
    siglip, qwen = str(checkpoints / "siglip"), str(checkpoints / "qwen")
    write_params(folder, **{
        "phantom.expected_counts": None, "phantom.zeroshot_siglip.checkpoint": siglip,
        "phantom.zeroshot_qwen.checkpoint": qwen, "phantom.zeroshot_siglip.batch_size": 2,
        "phantom.zeroshot_qwen.batch_size": 2, "phantom.finetune_siglip.checkpoint": siglip,
        "phantom.finetune_siglip.epochs": 1, "phantom.finetune_siglip.warmup_steps": 0,
        "phantom.finetune_siglip.save_every": 1000,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "data/raw").mkdir(parents=True)
        (folder / "data/raw/phantom").symlink_to(phantoms)
        for stage in ("extract_slices", "build_manifest", "split"):
            run_stage(stage)
    return folder


@pytest.mark.parametrize("stage", ["zeroshot_siglip", "zeroshot_qwen"])
def test_a_stage_that_ended_midway_asks_only_what_is_left(cut, stage, monkeypatch):
    monkeypatch.chdir(cut)
    take, asked = Images.take, []

    def count(self, rows, most=None):
        if most is not None and len(asked) >= most:
            raise Ends
        asked.extend(rows.tolist())
        return take(self, rows)

    monkeypatch.setattr(Images, "take", count)
    run_stage(stage)
    written = (cut / f"data/predictions/{stage}.csv").read_bytes()
    everything = sorted(asked)
    asked.clear()
    monkeypatch.setattr(Images, "take", lambda self, rows: count(self, rows, 4))
    with pytest.raises(Ends):
        run_stage(stage)
    assert 4 <= len(asked) < len(everything)
    monkeypatch.setattr(Images, "take", count)
    run_stage(stage)
    assert sorted(asked) == everything
    assert (cut / f"data/predictions/{stage}.csv").read_bytes() == written


def test_a_signal_after_the_training_costs_no_step(cut, monkeypatch, capsys):
    monkeypatch.chdir(cut)
    fit = calibration.fit_temperature

    def struck(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return fit(*arguments)

    monkeypatch.setattr(calibration, "fit_temperature", struck)
    with pytest.raises(SystemExit) as end:
        run_stage("finetune_siglip")
    assert end.value.code == 128 + signal.SIGTERM
    note = "Interrupted: the training is kept: the next run goes on with its calibration."
    assert note in capsys.readouterr().err
    monkeypatch.setattr(calibration, "fit_temperature", fit)
    monkeypatch.setattr(training, "classify", None)  # not a step more
    run_stage("finetune_siglip")
    assert "Going on after step" in capsys.readouterr().out
    assert not (cut / ".resume/finetune_siglip").exists()


@pytest.mark.parametrize("name", ORIGIN)
def test_answers_of_another_origin_are_not_taken_up(name, capsys):
    ask(open_journal(start(0), "x", {**ORIGIN, name: "other"}), 3)
    answers, then = ask(open_journal(start(0), "x", ORIGIN))
    assert answers == EXPECTED
    assert len(then) == 5
    assert f"they come from a run with other {name}\n" in capsys.readouterr().err


def test_a_damaged_origin_is_no_origin(here):
    ask(open_journal(start(0), "x", ORIGIN), 3)
    (here / ".resume/x/origin.json").write_text("{")
    assert len(ask(open_journal(start(0), "x", ORIGIN))[1]) == 5


# --- Origin ----------------------------------------------------------------------------------


def test_the_origin_follows_what_a_result_depends_on(here, checkpoints):
    (here / "data").mkdir()
    for name in ("manifest.csv", "images.npy", "split.csv"):
        (here / "data" / name).write_text(name)
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    accelerator = start(0)
    first = origin_of(accelerator, source, {"lr": 0.1})
    assert origin_of(accelerator, source, {"lr": 0.1}) == first
    assert json.loads(json.dumps(first)) == first
    assert differences(first, origin_of(accelerator, source, {"lr": 0.2})) == "parameters"
    (here / "data/split.csv").write_text("other")
    assert differences(first, origin_of(accelerator, source, {"lr": 0.1})) == "split"
    (here / "data/images.npy").write_text("other")
    assert differences(first, origin_of(accelerator, source, {"lr": 0.1})) == "images, split"
    other = find_checkpoint(str(checkpoints / "qwen"), "main")
    assert "weights" in differences(first, origin_of(accelerator, other, {"lr": 0.1}))
    assert differences([], first) == "everything"


def test_the_origin_follows_the_modules_and_the_script(here, checkpoints, monkeypatch):
    (here / "data").mkdir()
    for name in ("data/manifest.csv", "data/images.npy", "data/split.csv", "stage.py", "one.py"):
        (here / name).write_text(name)
    module = ModuleType("chest.one")
    module.__file__ = str(here / "one.py")
    monkeypatch.setitem(sys.modules, "chest.one", module)
    monkeypatch.setattr(sys, "argv", [str(here / "stage.py")])
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    for name in ("one.py", "stage.py"):
        before = origin_of(start(0), source, {})
        assert origin_of(start(0), source, {}) == before
        (here / name).write_text("other")
        assert differences(before, origin_of(start(0), source, {})) == "code"


def test_processes_that_see_different_states_do_not_start(checkpoints, data, monkeypatch):  # noqa: F811
    assert learn(checkpoints, data, states=True, crash_at=8) is None
    monkeypatch.setattr("accelerate.Accelerator.gather", lambda _, x: torch.tensor([6, 4]))
    with pytest.raises(ChestError, match="see different states"):
        learn(checkpoints, data, states=True)


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(here):
    (here / "target").write_text("kept")
    (here / ".resume").mkdir()
    (here / ".resume/x.lock").symlink_to(here / "target")
    with pytest.raises(OSError, match="symbolic link, not a lock; remove it"), alone("x"):
        pass
    assert (here / "target").read_text() == "kept"
