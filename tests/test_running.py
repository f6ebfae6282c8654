"""Signals: heeded where the work is whole, never lost, never waited for too long."""

import signal
import sys
import time

import pytest

from chest import running
from chest.running import Interrupted, alone, deferring_signals, ending_on_signals


def test_a_signal_ends_what_does_not_defer_it():
    with pytest.raises(Interrupted) as end, ending_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.signal == signal.SIGTERM


def test_a_signal_in_a_finalizer_ends_the_script_too(capsys):
    class Struck:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook
    with pytest.raises(Interrupted) as end, ending_on_signals():
        Struck()
        time.sleep(5)
        raise AssertionError("lost")
    assert end.value.signal == signal.SIGTERM
    assert capsys.readouterr().err == ""
    assert sys.unraisablehook == before


def test_a_deferred_signal_is_told_and_nothing_else_happens():
    with pytest.raises(Interrupted), deferring_signals() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT


def test_a_signal_that_nobody_asked_for_is_not_lost():
    with pytest.raises(Interrupted) as end, deferring_signals():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.signal == signal.SIGTERM


def test_what_has_been_told_may_take_its_time(monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.05)
    saved = []
    with pytest.raises(Interrupted), deferring_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        if asked():
            time.sleep(0.2)
            saved.append(True)
    assert saved


def test_what_does_not_ask_is_ended_after_all(monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.05)
    with pytest.raises(Interrupted), deferring_signals():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("not ended")


def test_the_same_signal_again_ends_it_at_once_and_another_does_not():
    passed = []
    with pytest.raises(Interrupted), deferring_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        passed.append("another")
        signal.raise_signal(signal.SIGINT)
        passed.append("the same")
    assert passed == ["another"]


def test_handlers_are_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ending_on_signals(), deferring_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_the_lock_is_for_one_stage_and_goes_with_its_holder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with alone("a"), alone("b"):
        with pytest.raises(BlockingIOError, match="a is running"), alone("a"):
            pass
        # Of several processes the first one holds it for all.
        monkeypatch.setenv("RANK", "1")
        with alone("a"):
            pass
        monkeypatch.delenv("RANK")
    with alone("a"):
        pass
