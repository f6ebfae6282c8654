"""Every script says what it does and how it is called."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from support import ROOT

SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("stages", "tools", "data", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


def call(monkeypatch, script: str, argument: str) -> int:
    """Run a script with one argument; return its exit code."""
    monkeypatch.setattr(sys, "argv", [script, argument])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_it_does_and_names_its_command(script, monkeypatch, capsys):
    assert call(monkeypatch, script, "--help") == 0
    told = capsys.readouterr().out
    assert re.search(rf"^    (python|accelerate launch) {script}", told, re.MULTILINE), told
    summary = (ROOT / script).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert summary in " ".join(told.split())


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.startswith("stages/")])
def test_a_stage_takes_no_argument(script, monkeypatch, capsys):
    assert call(monkeypatch, script, "--lr=1") == 2
    assert "params.yaml" in capsys.readouterr().err


def test_scripts_were_found():
    assert {Path(script).parts[0] for script in SCRIPTS} >= {"stages", "tools", "data"}
