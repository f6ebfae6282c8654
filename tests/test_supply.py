"""Where code and weights come from: locked packages, safetensors alone, pinned commits, no network.

What is not executed: pickles, and the Python that a checkpoint may bring.
"""

import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT, load_script, without_network, write_params

from chest.compute import CheckpointError, find_checkpoint, load_normalization, start
from chest.qwen import load_reader
from chest.siglip import load_classifier, load_for_prompts

FOLDERS = ("stages", "chest", "tools", "data", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]

# --- The locks -------------------------------------------------------------------------------

INPUTS = ("requirements.txt", "requirements-dev.txt")
LOCKS = ("requirements-build.lock", "requirements.lock", "requirements-cpu.lock",
         "requirements-cuda.lock")  # fmt: skip
# Read by others that are told of them, and imported nowhere.
NOT_IMPORTED = {"protobuf"}  # transformers reads SentencePiece's models with it
PLATFORM = ("cpython-311", "linux-x86_64")
HERE = (sys.implementation.cache_tag, sysconfig.get_platform())


def lines_of(name: str) -> list[str]:
    """A file's lines but for comments and empty ones."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pins() -> dict[str, str]:
    """{package: version} of what the requirements pin; every line pins exactly."""
    lines = [line for name in INPUTS for line in lines_of(name)]
    found = [line.partition("==") for line in lines if not line.startswith("-")]
    assert all(equal and re.fullmatch(r"[\w.]+", value) for _, equal, value in found)
    assert {line for line in lines if line.startswith("-")} == {"-r requirements.txt", "-e ."}
    return {canonicalize_name(name): value for name, _, value in found}


def locked(*names: str) -> dict[str, str]:
    """{package: version}, without the name of a build."""
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for name in names for line in lines_of(name))
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def needed(roots: Iterable[str]) -> set[str]:
    """The installed packages that `roots` bring, and those that these bring."""
    found, waiting = set(), [Requirement(root) for root in roots]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), ("", *sorted(requirement.extras))
        found.add(name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.requires(name) or []:
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": x}) for x in extras):
                waiting.append(more)
    return found


def test_every_requirement_is_locked_at_its_version():
    lock = locked(*LOCKS)
    assert {name: lock.get(name) for name in pins()} == pins()


@pytest.mark.skipif(HERE != PLATFORM, reason=f"the locks are for {' '.join(PLATFORM)}")
def test_everything_that_is_installed_for_the_project_is_locked_at_its_version():
    lock = locked(*LOCKS)
    installed = {name: metadata.version(name).partition("+")[0] for name in needed(pins())}
    assert len(installed) > len(pins())
    assert {name: lock.get(name) for name in installed} == installed


def test_the_locks_hold_versions_with_their_hashes_and_nothing_else():
    for name in LOCKS:
        blocks = re.split(r"\n(?=\w)", "\n".join(lines_of(name)))
        for block in blocks:
            first, *hashes = block.split(" \\\n")
            assert re.fullmatch(r"[\w.-]+==[\w.]+(\+cpu)?", first), block
            assert hashes, block
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", x) for x in hashes), block
        assert not re.search(r"https?:|file:|--index|--find", (ROOT / name).read_text())


def test_torch_is_one_version_in_two_builds_and_cuda_is_apart():
    cpu, cuda, others = (locked(name) for name in (LOCKS[2], LOCKS[3], LOCKS[1]))
    assert cpu == {"torch": pins()["torch"]} == {"torch": cuda["torch"]}
    assert f"torch=={pins()['torch']}+cpu " in (ROOT / LOCKS[2]).read_text()
    assert "nvidia-cublas" in cuda
    assert not {*cuda} & {*others}


def test_every_package_that_the_code_imports_is_a_requirement_and_each_is_used():
    direct = {canonicalize_name(line.partition("==")[0]) for line in lines_of(INPUTS[0])[:-1]}
    assert distributions_in(SOURCES) == direct - NOT_IMPORTED
    assert distributions_in([*(ROOT / "tests").glob("*.py")]) <= {*pins()}


def distributions_in(paths: list[Path]) -> set[str]:
    """The packages of others that the scripts and modules in `paths` import."""
    own = {path.stem for path in (*SOURCES, *paths)} | {"chest"}
    modules = {name for path in paths for name in imports(ast.parse(path.read_text()))}
    distributions = metadata.packages_distributions()
    return {
        canonicalize_name(distribution)
        for name in modules - own - {*sys.stdlib_module_names}
        for distribution in distributions[name]
    }


def imports(tree: ast.AST) -> Iterator[str]:
    """The outermost packages that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def recipe(*arguments: str) -> list[str]:
    """What `make venv` would do."""
    command = ["make", "--dry-run", "--always-make", "venv", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_make_installs_by_hash_where_the_locks_fit_and_else_says_so():
    fits = recipe(f"LOCKED={' '.join(HERE)}")
    install = [line for line in fits if "bin/pip install" in line]
    assert all("--no-deps --no-build-isolation" in line for line in install)
    assert all("--require-hashes" in x or "-e ." in x or "--dry-run" in x for x in install)
    elsewhere = recipe("LOCKED=cpython-27 vax")
    (told,) = [line for line in elsewhere if line.startswith("echo")]
    assert "not for " + " ".join(HERE) in told
    (install,) = [line for line in elsewhere if "bin/pip install" in line]
    assert install.endswith("-r requirements-dev.txt")


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_make_takes_the_cpu_build_where_pip_is_told_of_one(tmp_path, build):
    # A pip that finds a CPU build, or none, and notes what it is asked.
    (choice,) = [line for line in "\n".join(recipe()).replace("\\\n", "").splitlines()
                 if "--dry-run" in line]  # fmt: skip
    pip = tmp_path / ".venv/bin/pip"
    pip.parent.mkdir(parents=True)
    answer = "true" if build == "cpu" else "false"
    pip.write_text(f'#!/bin/sh\necho "$*" >> asked\ncase "$*" in *--dry-run*) {answer};; esac\n')
    pip.chmod(0o755)
    shutil.copy(ROOT / "requirements-cpu.lock", tmp_path)
    subprocess.run(["sh", "-c", choice], cwd=tmp_path, check=True)
    question, install = (tmp_path / "asked").read_text().splitlines()
    assert question.endswith(f"torch=={pins()['torch']}+cpu")
    assert install.endswith(f"--require-hashes -r requirements-{build}.lock")


def test_the_environment_is_stale_when_a_lock_changed(tmp_path):
    for name in (*INPUTS, *LOCKS, "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    made = tmp_path / ".venv/.made"
    made.parent.mkdir()
    made.touch()
    question = ["make", "--question", "venv"]
    assert subprocess.run(question, cwd=tmp_path).returncode == 0
    for name in (*INPUTS, *LOCKS, "pyproject.toml"):
        later = made.stat().st_mtime + 9
        os.utime(tmp_path / name, (later, later))
        assert subprocess.run(question, cwd=tmp_path, capture_output=True).returncode == 1, name
        os.utime(tmp_path / name, (1, 1))


def test_the_lock_keeps_what_is_locked_and_parts_what_cuda_needs(monkeypatch, tmp_path, capsys):
    lock = load_script("tools/lock.py")
    for name in LOCKS:
        shutil.copy(ROOT / name, tmp_path)
    before = {name: (tmp_path / name).read_text() for name in LOCKS}
    monkeypatch.chdir(tmp_path)
    asked = []

    def told(*command):  # uv that has nothing newer: what it was given is what it says
        asked.append(command)
        return ""

    monkeypatch.setattr(lock, "told", told)
    lock.main([])
    assert {name: (tmp_path / name).read_text() for name in LOCKS} == before
    assert "->" not in capsys.readouterr().out
    (compile,) = asked  # the CPU build is locked already, and not asked for
    assert {"--generate-hashes", "requirements-dev.txt"} <= {*compile}
    assert not [word for word in compile if "index" in word or "http" in word]


def test_a_lock_that_cannot_be_made_leaves_the_old_one(monkeypatch, tmp_path):
    lock = load_script("tools/lock.py")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(lock.LockError, match="uv is missing: pip install uv"):
        lock.main([])
    (tmp_path / "uv").write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    (tmp_path / "uv").chmod(0o755)
    with pytest.raises(lock.LockError, match=r"uv failed.*\n.*no such version"):
        lock.main([])
    assert (tmp_path / "requirements.lock").read_text() == (ROOT / "requirements.lock").read_text()


# --- What the sources may not do ---------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"}
# chest.compute.Source.load_model asks for safetensors; its `load` is for what has no weights.
WEIGHTLESS = {"AutoTokenizer.from_pretrained", "kind.from_pretrained"}


def dangers(source: str) -> Iterator[str]:
    """What in a module may run code that came with data: pickles, and a checkpoint's Python."""
    tree = ast.parse(source)
    yield from (f"import {name}" for name in imports(tree) if name in UNPICKLERS)
    safe = {id(x) for call in ast.walk(tree) if isinstance(call, ast.Call) for x in safe_in(call)}
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name in FORBIDDEN:
            yield name
        if name.endswith(".from_pretrained") and id(node) not in safe:
            yield f"{name} past chest.compute.Source"
        if name in ("np.load", "numpy.load") and id(node) not in safe:
            yield f"{name} without allow_pickle=False"
        if getattr(node, "arg", "") == "allow_pickle" and not is_constant(node.value, False):
            yield "allow_pickle"
        if "trust_remote_code" in (getattr(node, "arg", ""), getattr(node, "value", "")):
            yield "trust_remote_code"


def safe_in(call: ast.Call) -> Iterator[ast.expr]:
    """The parts of a call that name a function which that call keeps from unpickling."""
    name = ast.unparse(call.func)
    keywords = {word.arg: word.value for word in call.keywords}
    if name.endswith((".from_pretrained", ".load")):
        if is_constant(keywords.get("use_safetensors"), True):
            yield call.func
        if is_constant(keywords.get("allow_pickle"), False):
            yield call.func
    if name in ("source.load", "self.load"):
        yield from (x for x in call.args if ast.unparse(x) in WEIGHTLESS)
    if name == "source.load_model":
        yield from call.args


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_can_run_code_that_came_with_data(path):
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\nweights = torch.load(path)",
        "load = torch.load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "pd.read_pickle(path)",
        "SiglipModel.from_pretrained(path)",
        "SiglipModel.from_pretrained(path, use_safetensors=False)",
        "load(SiglipModel.from_pretrained)",
        "source.load(SiglipModel.from_pretrained)",
        "call = SiglipModel.from_pretrained",
        "source.load(AutoModel.from_pretrained, trust_remote_code=True)",
        "arguments = {'trust_remote_code': True}",
    ],
)
def test_the_look_through_the_sources_finds(source):
    assert list(dangers(source))


def test_the_look_through_the_sources_lets_pass():
    fine = """
np.load(path, mmap_mode="r", allow_pickle=False)
source.load_model(SiglipModel.from_pretrained, dtype=dtype)
SiglipModel.from_pretrained(path, use_safetensors=True)
json.load(file)
"""
    assert list(dangers(fine)) == []


# --- What checkpoints may not do ---------------------------------------------------------------


class Trap:
    """As a pickle it makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


LOAD = {
    "siglip, prompts": ("siglip", lambda source: load_for_prompts(source, 224)),
    "siglip, classifier": ("siglip", lambda source: load_classifier(source, 224)),
    "qwen": ("qwen", lambda source: load_reader(source, 224, start(1))),
}


@pytest.mark.parametrize("name", LOAD)
def test_pickled_weights_are_refused_and_not_even_opened(checkpoints, tmp_path, name):
    kind, load = LOAD[name]
    folder = shutil.copytree(checkpoints / kind, tmp_path / kind)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{folder}.*safetensors"):
        load(find_checkpoint(str(folder), "main"))
    assert not (tmp_path / "sprung").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()  # otherwise nothing was tried above


@pytest.mark.parametrize("name", LOAD)
def test_python_beside_the_weights_is_not_run_whatever_one_answers(
    checkpoints, tmp_path, monkeypatch, name
):
    kind, load = LOAD[name]
    folder = shutil.copytree(checkpoints / kind, tmp_path / kind)
    trap = f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n"
    (folder / "own.py").write_text(trap + "class Config: pass\nclass Model: pass\n")
    own = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Model", None]}
    own |= {f"Auto{kind}": "own.Model" for kind in ("Model", "ImageProcessor", "Processor")}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        more = {"auto_map": own, "trust_remote_code": True, "custom_pipelines": {"own": "own"}}
        (folder / file).write_text(json.dumps(content | more))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    load(find_checkpoint(str(folder), "main"))
    assert not (tmp_path / "sprung").exists()
    assert asked == []


# --- Which commit is loaded ----------------------------------------------------------------------

OLDER, NEWER = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch, checkpoints):
    """A cache of the hub with two commits of one checkpoint, and no way to the hub itself.

    They differ in the mean that is subtracted from an image: 0.5 in the older one, 0.25 now.
    """
    import huggingface_hub.constants

    repository = tmp_path / "models--somebody--siglip"
    for commit, mean in ((OLDER, 0.5), (NEWER, 0.25)):
        folder = shutil.copytree(checkpoints / "siglip", repository / "snapshots" / commit)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [mean] * 3}))
    for name, commit in (("main", NEWER), ("v1", OLDER)):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("revision", "commit", "mean"),
    [("main", NEWER, 0.25), ("v1", OLDER, 0.5), (OLDER, OLDER, 0.5), (NEWER, NEWER, 0.25)],
)
def test_a_pinned_revision_is_the_commit_that_is_loaded(hub, revision, commit, mean):
    source = find_checkpoint("somebody/siglip", revision)
    assert (source.revision, source.commit) == (revision, commit)
    assert load_normalization(source).mean == (mean,) * 3


def test_a_revision_that_is_not_there_is_refused_and_no_other_taken(hub):
    with pytest.raises(CheckpointError, match=r"somebody/siglip \(revision 33333"):
        find_checkpoint("somebody/siglip", "3" * 40)


def test_the_committed_results_name_checkpoint_revision_and_commit():
    runs = json.loads((ROOT / "metrics/runs.json").read_text())
    trained = [run for run in runs.values() if run["weights"] != "none"]
    assert len(trained) >= 3
    for run in trained:
        assert {"checkpoint", "revision", "commit", "torch", "transformers"} <= {*run}


# --- No network ----------------------------------------------------------------------------------

ATTEMPTS = {
    "socket.getaddrinfo": "socket.create_connection(('127.0.0.1', 9))",
    "socket.gethostbyname": "socket.gethostbyname('localhost')",
    "socket.connect": "socket.socket().connect_ex(('127.0.0.1', 9))",
    "socket.bind": "socket.socket().bind(('127.0.0.1', 0))",
    "socket.sendto": "socket.socket(type=2).sendto(b'x', ('127.0.0.1', 9))",
    "socket.sendmsg": "socket.socket(type=2).sendmsg([b'x'], [], 0, ('127.0.0.1', 9))",
}


def run_python(folder, log, *arguments):
    env = without_network({**os.environ, "PYTHONPATH": str(ROOT)}, log)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


def test_without_a_network_each_attempt_fails_and_is_noted(tmp_path):
    tries = "".join(
        f"try: {code}\nexcept OSError as error: print('refused:', error)\n"
        for code in ATTEMPTS.values()
    )
    # A process that it starts is watched too; a socket within the machine is none of the network.
    own = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n"
    pair = "a, b = socket.socketpair()\na.sendall(b'x')\nassert b.recv(1) == b'x'\n"
    log = tmp_path / "attempts"
    done = run_python(tmp_path, log, "-c", own, f"import socket\n{pair}{tries}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: no network in this test") == len(ATTEMPTS)
    assert [line.split()[0] for line in log.read_text().splitlines()] == list(ATTEMPTS)


def test_the_data_stages_open_no_connection(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data/raw/phantom")
    write_params(tmp_path, **{"phantom.expected_counts": None})
    stages = ("extract_slices", "build_manifest", "split", "floors")
    scripts = [str(ROOT / "stages" / f"{stage}.py") for stage in stages]
    run = """if True:
        import runpy, sys
        for script in sys.argv[1:]:
            sys.argv = [script]
            runpy.run_path(script, run_name="__main__")"""
    log = tmp_path / "attempts"
    done = run_python(tmp_path, log, "-c", run, *scripts)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/predictions/floor_site.csv").exists()
    assert log.read_text() == ""
