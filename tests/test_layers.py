"""Packages of chest import in one direction only; scripts are imported by nobody."""

import ast
import shutil
import sys
from pathlib import Path

from support import ROOT, run_in

SCRIPTS = ("stages", "tools", "benchmarks", "data", "tests")


def lint(folder: Path, fails: bool = False) -> str:
    command = str(Path(sys.executable).with_name("lint-imports"))
    return run_in(folder, command, "--no-cache", fails=fails)


def test_packages_import_only_from_those_below():
    assert "1 kept, 0 broken" in lint(ROOT)


def test_an_import_from_above_or_a_package_without_a_place_is_found(tmp_path):
    for name in ("chest", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    imported = "import chest.models.siglip\n"
    (tmp_path / "chest/core/more.py").write_text(imported)
    (tmp_path / "chest/evaluation/more.py").write_text(imported)
    (tmp_path / "chest/other").mkdir()
    (tmp_path / "chest/other/__init__.py").write_text("")
    told = " ".join(lint(tmp_path, fails=True).split())
    assert "chest.core.more -> chest.models.siglip" in told
    assert "chest.evaluation.more -> chest.models.siglip" in told
    assert "chest.other" in told


def test_chest_imports_no_script():
    names = {path.stem for folder in SCRIPTS for path in (ROOT / folder).glob("*.py")}
    for path in (ROOT / "chest").rglob("*.py"):
        roots = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.partition(".")[0])
        assert not roots & {*SCRIPTS, *names}, path
