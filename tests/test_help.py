"""Each script says what it is for, with a command to copy."""

import runpy
import sys

import pytest
from support import ROOT

SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("stages", "tools", "data", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


def started(script, monkeypatch, *arguments):
    """Run a script as a person does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_and_does_no_work(script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert started(script, monkeypatch, "--help") == 0
    assert f"python {script}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_argument_that_is_not_known_is_refused(script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert started(script, monkeypatch, "--no-such-option") == 2
    assert script.rpartition("/")[2] in (told := capsys.readouterr().err) or "ERROR" in told
    assert not list(tmp_path.iterdir())
