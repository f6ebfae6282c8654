"""What the code imports is pinned, and what is pinned or installed is locked by hash."""

import ast
import re
import sys
import sysconfig
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

LOCKS = (
    "requirements-build.lock",
    "requirements.lock",
    "requirements-cpu.lock",
    "requirements-cuda.lock",
)
CODE = ("chest", "stages", "tools", "data", "benchmarks")
LOADED_BY_OTHERS = {"python-gdcm", "protobuf"}  # transformers reads SentencePiece's models with it


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def locked(*names: str) -> dict[str, str]:
    """Return {package: version}, without the name of a build."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


PINS = pins("requirements.txt") | pins("requirements-dev.txt")


def imported(*folders: str) -> set[str]:
    """Return the packages of others that the code in these folders imports."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {"chest", "fakecuda", *folders, *(path.stem for path in paths)} | {
        *sys.stdlib_module_names
    }
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
    distributions = metadata.packages_distributions()
    return {canonicalize_name(name) for module in modules - own for name in distributions[module]}


def needed(packages: set[str]) -> set[str]:
    """Return the installed packages that `packages` bring, themselves included."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(name), "") for name in packages]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - found
        found |= new
        waiting += [
            (Requirement(x), extra) for _, extra in new for x in metadata.requires(name) or ()
        ]
    return {name for name, _ in found}


def test_every_package_that_is_imported_is_pinned_and_each_is_used():
    assert imported(*CODE) == {*pins("requirements.txt")} - LOADED_BY_OTHERS
    assert imported("tests") - {*PINS} == set()


def test_every_pin_is_locked_at_its_version():
    lock = locked(*LOCKS)
    assert {name: lock.get(name) for name in PINS} == PINS


@pytest.mark.skipif(
    (sys.implementation.cache_tag, sysconfig.get_platform()) != ("cpython-311", "linux-x86_64"),
    reason="the locks are for CPython 3.11 on Linux x86_64",
)
def test_everything_that_is_installed_for_the_project_is_locked_at_its_version():
    lock = locked(*LOCKS)
    installed = {name: metadata.version(name).partition("+")[0] for name in needed({*PINS})}
    assert len(installed) > 2 * len(PINS)
    assert {name: lock.get(name) for name in installed} == installed


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_versions_with_hashes_and_names_no_index(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    blocks = re.split(r"\n(?=\w)", "\n".join(lines))
    for block in blocks:
        first, *hashes = block.split(" \\\n")
        assert re.fullmatch(r"[\w.-]+==[\w.]+(\+cpu)?", first), block
        assert hashes, block
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", x) for x in hashes), block


def test_torch_is_one_version_in_two_builds_and_what_cuda_needs_is_apart():
    cpu, cuda, others = (locked(name) for name in (LOCKS[2], LOCKS[3], LOCKS[1]))
    assert cpu == {"torch": PINS["torch"]} == {"torch": cuda["torch"]}
    assert "nvidia-cublas" in cuda
    assert not {*cuda} & {*others}
