"""How a run may end, by force or by a fault: what was there stays, and the next run makes it good.

CHEST_KILLS sets how often each stage is killed (10); `make soak` raises it.
"""

from chest.early import ENDING

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from support import ROOT, copy_repository, environment, run_in, write_params

KILLS = int(os.environ.get("CHEST_KILLS", "10"))
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = ("extract_slices", "build_manifest", "split", "audit", "floors", "zeroshot_qwen",
          "zeroshot_siglip", "finetune_siglip", "probe_shortcuts", "evaluate")  # fmt: skip
SMALL = {
    "phantom.expected_counts": None,
    "phantom.finetune_siglip.epochs": 3,
    "phantom.finetune_siglip.warmup_steps": 3,
    "phantom.finetune_siglip.save_every": 2,
    "phantom.zeroshot_qwen.images": "all",
    "phantom.zeroshot_qwen.batch_size": 8,
    "phantom.zeroshot_siglip.images": "all",
    "phantom.zeroshot_siglip.batch_size": 8,
}


def outs(stage: str) -> list[str]:
    """The files and folders that a stage writes."""
    content = PIPELINE[stage]
    listed = [*content["outs"], *content.get("metrics", [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in listed]


def contents(folder: Path, stage: str) -> dict[str, bytes]:
    """{path: bytes} of all that a stage has written in `folder`."""
    found = {}
    for out in outs(stage):
        path = folder / out
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def files_below(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of the files in a folder that have their place, not of unfinished ones."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not any(p.endswith((".partial", ".old")) for p in file.parts)
    }


class End(NamedTuple):
    """How a stage ended: its exit code (below 0: the signal), what it printed, after how long."""

    code: int
    printed: str
    seconds: float


@dataclass(frozen=True)
class Zygote:
    """The process of zygote.py, and where what its children print goes."""

    process: subprocess.Popen
    output: Path

    def start(self, folder: Path, stage: str, size: int | None = None, plain=False):
        """Start a stage; returns its process number."""
        self.output.write_text("")
        self.output.chmod(0o666)
        order = {"folder": str(folder), "stage": stage, "output": str(self.output), "size": size,
                 "plain": plain}  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def strike(self, folder: Path, stage: str, moment: float, number: int) -> End:
        """Run a stage, and send it a signal after `moment` seconds, if it still runs then."""
        return self.run(folder, stage, (moment, number))

    def run(self, folder: Path, stage: str, strike: tuple[float, int] = (), **limits) -> End:
        process, began = self.start(folder, stage, **limits), time.perf_counter()
        if strike and not select.select([self.process.stdout], [], [], strike[0])[0]:
            with suppress(ProcessLookupError):
                os.kill(process, strike[1])
        code = int(self.process.stdout.readline())
        seconds = time.perf_counter() - began
        return End(code, self.output.read_text(errors="replace"), seconds)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "zygote.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    yield Zygote(process, tmp_path_factory.mktemp("printed") / "output")
    process.stdin.close()
    process.wait()


def small_clone(folder: Path, phantoms: Path, checkpoints: Path) -> Path:
    """A clone with few phantoms and the tiny checkpoints, of which nothing has run."""
    copy_repository(folder)
    (folder / "data" / "dvc.yaml").unlink()
    (folder / "dvc.lock").unlink()
    for name in ("metrics", "plots"):
        shutil.rmtree(folder / name)
    shutil.copytree(phantoms, folder / "data/raw/phantom")
    shutil.copytree(checkpoints, folder / "data/checkpoints/phantom")
    write_params(folder, **SMALL)
    run_in(folder, "git", "add", "--all")
    run_in(folder, "git", "commit", "--quiet", "--message", "Few phantoms")
    return folder


@dataclass(frozen=True)
class Undisturbed:
    """A clone in which every stage ran in peace: what each wrote, and how long it took (s)."""

    folder: Path
    written: dict[str, dict[str, bytes]]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def undisturbed(zygote, phantoms, checkpoints, tmp_path_factory):
    folder = small_clone(tmp_path_factory.mktemp("ends") / "undisturbed", phantoms, checkpoints)
    written, seconds = {}, {}
    for stage in STAGES:
        code, printed, seconds[stage] = zygote.run(folder, stage)
        assert code == 0, printed
        written[stage] = contents(folder, stage)
        assert len(written[stage]) >= len(outs(stage))
    return Undisturbed(folder, written, seconds)


@pytest.fixture(scope="module")
def again(undisturbed):
    """A copy of that clone, for tests that leave it as they found it."""
    return shutil.copytree(undisturbed.folder, undisturbed.folder.with_name("again"), symlinks=True)


# --- Killed ----------------------------------------------------------------------------------


def tell_kills(died: dict[str, int], struck: int, whole: int) -> str:
    """The line that benchmarks/soak.py reads."""
    return f"kills survived: {sum(died.values())} of {struck}, whole runs between: {whole}; {died}"


def test_killed_at_any_moment_the_pipeline_ends_with_the_same_bytes(
    zygote, undisturbed, phantoms, checkpoints
):
    clone = small_clone(undisturbed.folder.with_name("killed"), phantoms, checkpoints)
    moments, died, struck, done = random.Random(0), dict.fromkeys(STAGES, 0), 0, 0
    for stage in STAGES:
        whole, seconds = undisturbed.written[stage], undisturbed.seconds[stage]
        for trial in count(1):
            end = zygote.strike(clone, stage, moments.uniform(0, seconds), signal.SIGKILL)
            assert end.code in (0, -signal.SIGKILL), end.printed
            struck += 1
            died[stage] += end.code != 0
            # Of what is there by now, everything is whole.
            for path, content in contents(clone, stage).items():
                assert content == whole[path], f"{stage}: {path}"
            if end.code and died[stage] % 5 == 0:
                end = zygote.run(clone, stage)
                assert end.code == 0, end.printed
            if end.code == 0:
                assert contents(clone, stage) == whole, stage
                done += 1
                seconds = (seconds + end.seconds) / 2  # so it takes as long on a busier machine
            if died[stage] == KILLS:
                break
            assert trial < 5 * KILLS + 10, f"{stage} is done before it is killed: {died}"
        run_in(clone, "env", "OMP_NUM_THREADS=1", "dvc", "repro", "--single-item", stage)
        assert contents(clone, stage) == whole, stage
    assert run_in(clone, "dvc", "status").strip() == "Data and pipelines are up to date."
    left = [p for p in clone.rglob(".*") if p.name.endswith((".partial", ".old"))]
    assert left == []
    print(tell_kills(died, struck, done))


@pytest.mark.parametrize("turn", range(max(1, KILLS // 10)))
def test_dvc_killed_with_its_stage_goes_on_by_itself(undisturbed, phantoms, checkpoints, turn):
    clone = small_clone(undisturbed.folder.with_name(f"dvc-killed-{turn}"), phantoms, checkpoints)
    moments, command = random.Random(turn), ["dvc", "repro", "audit", "zeroshot_siglip"]
    popen = partial(
        subprocess.Popen, cwd=clone, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**environment(clone), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for stage in ("extract_slices", "build_manifest", "zeroshot_siglip"):
        lock = clone / ".resume" / f"{stage}.lock"  # there when the stage has begun
        lock.unlink(missing_ok=True)
        with popen(command) as process:
            while process.poll() is None and not lock.exists():
                time.sleep(0.01)
            with suppress(subprocess.TimeoutExpired):
                # Not when it is done: DVC then rewrites .dvc/tmp/rwlock, and reads no torn one.
                process.wait(moments.uniform(0, 0.5 * undisturbed.seconds[stage]))
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    run_in(clone, "env", "OMP_NUM_THREADS=1", *command)
    for stage in ("extract_slices", "build_manifest", "split", "audit", "zeroshot_siglip"):
        assert contents(clone, stage) == undisturbed.written[stage], stage


@pytest.mark.parametrize(
    "script", [("draw_phantoms.py", "--scale", "0.05"), ("make_checkpoints.py",)]
)
def test_killed_at_any_moment_what_the_phantom_profile_reads_is_whole(tmp_path, script):
    command = [sys.executable, ROOT / "data" / script[0], *script[1:], "--into"]
    began = time.perf_counter()
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True)
    taken, whole = time.perf_counter() - began, files_below(tmp_path / "whole")
    assert whole
    moments = random.Random(1)
    for _ in range(KILLS):
        with subprocess.Popen([*command, "killed"], cwd=tmp_path) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, taken))
            process.kill()
        found = files_below(tmp_path / "killed")
        assert found.items() <= whole.items()
        # A folder is there as a whole or not at all; checkpoints are two folders.
        assert {p.split("/")[0] for p in found} in (
            set(),
            {"siglip"},
            {p.split("/")[0] for p in whole},
        )
    subprocess.run([*command, "killed"], cwd=tmp_path, check=True)
    assert files_below(tmp_path / "killed") == whole


# --- Ended -----------------------------------------------------------------------------------


def ends_cleanly(code: int, printed: str, number: int) -> bool:
    """Whether the signal ended the stage: then by one line; else it was done by then."""
    said = [line for line in printed.splitlines() if "Interrupted" in line or "Error" in line]
    assert "Traceback" not in printed
    assert code in (0, 128 + number), printed
    assert len(said) == (code != 0), printed
    assert all(line.startswith("Interrupted: ") for line in said)
    return code != 0


@pytest.mark.parametrize(
    ("number", "shares"), [(signal.SIGTERM, (0, 0.4, 0.8)), (signal.SIGINT, (0.2, 0.6))]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_a_stage_cleanly(zygote, undisturbed, again, stage, number, shares):
    interrupted = 0
    for share in shares:
        moment = share * undisturbed.seconds[stage]
        code, printed, seconds = zygote.strike(again, stage, moment, number)
        assert seconds - moment < 5
        interrupted += ends_cleanly(code, printed, number)
    assert interrupted
    assert contents(again, stage) == undisturbed.written[stage]
    assert not [p for p in again.rglob(".*") if p.name.endswith((".partial", ".old"))]


def listens(process: subprocess.Popen) -> bool:
    """Whether a process handles SIGTERM by now."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.parametrize("stage", ["split", "zeroshot_siglip"])
def test_a_signal_ends_a_script_cleanly_from_its_first_line_on(undisturbed, again, stage):
    popen = partial(
        subprocess.Popen, [sys.executable, f"stages/{stage}.py"], cwd=again, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(again), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    began = time.perf_counter()
    with popen() as run:
        assert run.wait() == 0
    taken = time.perf_counter() - began
    for share, number in zip((0, 0, 0.1, 0.3, 0.6, 0.9), ENDING * 3, strict=True):
        with popen() as run:
            while not listens(run):
                time.sleep(0.001)
            if share == 0:
                libraries = Path(f"/proc/{run.pid}/maps").read_text()
                assert "numpy" not in libraries  # nothing is imported yet
            with suppress(subprocess.TimeoutExpired):
                run.wait(share * taken)
            run.send_signal(number)
            printed, _ = run.communicate(timeout=5)
        assert ends_cleanly(run.returncode, printed, number) or share > 0.1
    assert contents(again, stage) == undisturbed.written[stage]


def test_an_interrupted_training_goes_on_where_it_was(zygote, undisturbed, again):
    stage, told, gone_on = "finetune_siglip", [], []
    shutil.rmtree(again / ".resume" / stage, ignore_errors=True)
    for _ in range(4):
        moment = 0.5 * undisturbed.seconds[stage]
        _, printed, _ = zygote.strike(again, stage, moment, signal.SIGTERM)
        gone_on += re.findall(r"Going on after step (\d+)", printed)
        told += re.findall(r"goes on after step (\d+)", printed)
    code, printed, _ = zygote.run(again, stage)
    assert code == 0, printed
    gone_on += re.findall(r"Going on after step (\d+)", printed)
    # Each run says where it goes on, and where the next one will.
    assert told
    assert set(told) <= set(gone_on)
    assert contents(again, stage) == undisturbed.written[stage]
    assert not (again / ".resume" / stage).exists()


# --- No room, no permission, no input, not alone ---------------------------------------------


def fails(zygote, folder, stage, **limits):
    """The message of a stage that must end with exit code 1, and leave what was there."""
    before = contents(folder, stage)
    code, printed, _ = zygote.run(folder, stage, **limits)
    assert code == 1, printed
    assert "Traceback" not in printed
    (message,) = re.findall(r"^ERROR: .*", printed, re.MULTILINE)
    assert contents(folder, stage) == before
    assert not [p for p in folder.rglob(".*") if p.name.endswith((".partial", ".old"))]
    return message + printed.split(message, 1)[1]


@pytest.mark.parametrize("stage", STAGES)
def test_where_a_file_cannot_grow_what_was_there_stays(zygote, again, stage):
    # As on a full disk: the system refuses to write on. The training opens DVC's data base first.
    limits = (100, 300_000) if stage == "finetune_siglip" else (100,)
    for size in limits:
        told = fails(zygote, again, stage, size=size)
        assert "File too large" in told or "disk I/O error" in told


@pytest.mark.parametrize("stage", STAGES)
def test_without_permission_what_was_there_stays(zygote, again, stage):
    folders = {(again / out).parent for out in outs(stage)}
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert "Permission denied" in fails(zygote, again, stage, plain=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)


def inputs():
    """Each stage with each of the files and folders that it reads."""
    for stage in STAGES:
        for dep in PIPELINE[stage]["deps"]:
            if not dep.endswith(".py") and not dep.startswith("chest/"):
                yield stage, dep.replace("${profile}", "phantom")


@pytest.mark.parametrize(("stage", "dep"), [*inputs()])
def test_an_input_that_has_vanished_is_named(zygote, again, stage, dep):
    aside = again / "aside"
    (again / dep).rename(aside)
    try:
        assert Path(dep).name in fails(zygote, again, stage)
    finally:
        aside.rename(again / dep)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_at_once_is_refused(zygote, again, stage):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, 2); f.write('7'); \
f.flush(); print('held', flush=True); input()"
    lock = again / ".resume" / f"{stage}.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("")
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        assert f"{stage} is running in this folder already (process 7)" in fails(
            zygote, again, stage
        )
        other.stdin.write("\n")
        other.stdin.close()
