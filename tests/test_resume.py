"""Work that was done is taken up again, bit for bit, and only where it belongs."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from test_training import LIGHT, data, settings  # noqa: F401

from chest.answering import answer, in_batches
from chest.compute import find_checkpoint, load_normalization, start
from chest.errors import ChestError
from chest.predictions import CURVE_COLUMNS
from chest.resident import place_images
from chest.resume import States, differences, open_journal, origin_of
from chest.running import Interrupted
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
    from chest import training

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


def test_processes_that_see_different_states_do_not_start(checkpoints, data, monkeypatch):  # noqa: F811
    assert learn(checkpoints, data, states=True, crash_at=8) is None
    monkeypatch.setattr("accelerate.Accelerator.gather", lambda _, x: torch.tensor([6, 4]))
    with pytest.raises(ChestError, match="see different states"):
        learn(checkpoints, data, states=True)
