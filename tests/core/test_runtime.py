"""The entry point of scripts: arguments, errors as messages, and a clean end on signals."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from support import ROOT

from chest.core.errors import ChestError
from chest.core.runtime import deferred_interrupts, interrupt_note, run, run_stage

STAGE = '''"""Make something.

Reads nothing.
"""

import os
import signal
import sys
from pathlib import Path

from chest.core.errors import ChestError
from chest.core.files import replacing
from chest.core.runtime import run_stage


def main() -> None:
    with replacing("output.txt") as partial:
        partial.write_text("half")
        {line}


if __name__ == "__main__":
    run_stage(main)
'''


@pytest.fixture(autouse=True)
def handlers():
    """Restore pytest's signal handlers; return them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def stage(folder, line, *arguments):
    """Run a stage with this `line` as a process of its own; return code, stdout, stderr."""
    (folder / "stage.py").write_text(STAGE.format(line=line))
    done = subprocess.run(
        [sys.executable, "stage.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_is_the_docstring_and_nothing_runs(tmp_path):
    code, printed, _ = stage(tmp_path, "pass", "--help")
    assert (code, printed) == (0, "Make something.\n\nReads nothing.\n")
    assert not (tmp_path / "output.txt").exists()


def test_a_stage_takes_no_argument(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--fast"])
    with pytest.raises(SystemExit) as end:
        run_stage(lambda: pytest.fail("it ran"))
    assert end.value.code == 2
    assert "--fast: this stage takes no argument" in capsys.readouterr().err


def test_a_stage_of_several_blocks_takes_the_name_of_one(monkeypatch, capsys):
    named = []
    monkeypatch.setattr(sys, "argv", ["stage.py", "resnet50"])
    run_stage(named.append, argument="NAME")
    assert named == ["resnet50"]
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit):
        run_stage(named.append, argument="NAME")
    assert "nothing given: this stage takes one argument, NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("raise ChestError('no such image')", 1, "ERROR: no such image\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "Interrupted.\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "Interrupted.\n"),
    ],
)
def test_a_failed_stage_says_why_and_leaves_nothing(tmp_path, line, code, message):
    (tmp_path / "output.txt").write_text("old")
    assert stage(tmp_path, line) == (code, "", message)
    assert {path.name for path in tmp_path.iterdir()} == {"stage.py", "output.txt"}
    assert (tmp_path / "output.txt").read_text() == "old"


def test_a_bug_keeps_its_traceback(tmp_path):
    code, _, message = stage(tmp_path, "{}['key']")
    assert code == 1
    assert message.startswith("Traceback")
    assert message.endswith("KeyError: 'key'\n")


def test_a_full_disk_is_a_message_and_another_error_of_files_a_bug():
    def fail(number):
        raise OSError(number, os.strerror(number), "data/x.npy")

    with pytest.raises(SystemExit) as end:
        run(lambda: fail(errno.ENOSPC))
    assert end.value.code == "ERROR: No space left on device: data/x.npy"
    with pytest.raises(OSError, match="Is a directory"):
        run(lambda: fail(errno.EISDIR))


def test_notes_are_printed_after_the_interrupt(capsys):
    def main():
        with interrupt_note("Half of it is saved."):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 143
    assert capsys.readouterr().err == "Interrupted.\nHalf of it is saved.\n"


def test_a_deferred_signal_is_told_and_raised_at_the_end_of_the_block(handlers):
    passed = []
    with pytest.raises(KeyboardInterrupt) as end, deferred_interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()
        passed.append(True)
    assert passed
    assert end.value.args == (signal.SIGTERM,)
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_a_second_signal_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_an_error_in_a_deferring_block_is_not_hidden_by_the_signal():
    with pytest.raises(ChestError), deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ChestError
