"""The dependencies that dvc.yaml declares are what the stages import and read."""

import ast
from pathlib import Path

import pytest
import yaml
from support import ROOT

PIPELINES = ("dvc.yaml", "data/dvc.yaml")


def stages(pipeline: str) -> dict[str, dict]:
    """Return the stages of a dvc.yaml; of a `foreach` stage what it does."""
    found = yaml.safe_load((ROOT / pipeline).read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in found.items()}


STAGES = [(pipeline, name) for pipeline in PIPELINES for name in stages(pipeline)]


def script_of(pipeline: str, name: str) -> Path:
    return (ROOT / pipeline).parent / stages(pipeline)[name]["cmd"].split()[1]


def imported_modules(script: Path) -> set[Path]:
    """Return the files of chest/ that a script imports, directly or not; packages left out."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        for module in direct_imports(waiting.pop()) - found:
            found.add(module)
            waiting.append(module)
    return found


def direct_imports(script: Path) -> set[Path]:
    names = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chest"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("chest")}
    paths = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in paths if path.exists()}


@pytest.mark.parametrize(("pipeline", "name"), STAGES)
def test_code_dependencies_are_what_the_stage_imports(pipeline, name):
    folder = (ROOT / pipeline).parent
    deps = [(folder / dep).resolve() for dep in stages(pipeline)[name]["deps"] if "$" not in dep]
    code = [dep for dep in deps if dep.suffix == ".py" or dep.is_relative_to(ROOT / "chest")]
    script = script_of(pipeline, name)
    needed = {script, *imported_modules(script)}
    missing = {path for path in needed if not any(path.is_relative_to(dep) for dep in code)}
    unused = {dep for dep in code if not any(path.is_relative_to(dep) for path in needed)}
    assert (missing, unused) == (set(), set())


def test_only_evaluate_depends_on_the_folders_of_other_systems():
    # A new module for another model must not retrain this one.
    folders = {"chest/models", "chest/evaluation", "chest/reporting", "chest/data"}
    users = {name for name, stage in stages("dvc.yaml").items() if folders & {*stage["deps"]}}
    assert users <= {"evaluate"}


def test_expensive_stages_have_cached_outputs_only():
    # One output that is not cached disables DVC's run cache for its whole stage.
    for pipeline, name in STAGES:
        outs = stages(pipeline)[name].get("outs", [])
        if name != "evaluate":
            assert all(isinstance(out, str) for out in outs), name


def test_every_script_is_a_stage():
    scripts = {script_of("dvc.yaml", name).stem for name in stages("dvc.yaml")}
    assert scripts == {path.stem for path in (ROOT / "stages").glob("*.py")}
