"""What is too long for a test: other processors, kills, and files changed at random.

Machines  a fresh clone runs the pipeline with one and two threads, with the kernels of this
          processor and with those of the simplest x86-64: metrics and plots are the same bytes,
          and the predictions agree to four places
Kills     `dvc repro` is killed or interrupted at random moments, again and again; then it goes on,
          and ends with the bytes of an undisturbed run
Fuzz      every reader of foreign files gets files changed at random: it reads or refuses them
Writes    benchmarks/results/soak.json

    python benchmarks/soak.py                     (or: make soak; about an hour on two CPU cores)
    python benchmarks/soak.py --only kills --kills 5
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from fuzz import fuzz
from measure import circumstances

from chest.core.errors import ChestError
from chest.core.files import write_json
from chest.core.labels import LABELS
from chest.core.runtime import parser, run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
# Kernels that every x86-64 processor has, as a stand-in for other processors.
SIMPLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
MACHINES = {
    "own kernels, 2 threads": {"OMP_NUM_THREADS": "2"},
    "own kernels, 1 thread": {"OMP_NUM_THREADS": "1"},
    "simple kernels, 2 threads": {"OMP_NUM_THREADS": "2", **SIMPLE},
    "simple kernels, 1 thread": {"OMP_NUM_THREADS": "1", **SIMPLE},
}
FEW = {
    "phantom.expected_counts": None,
    "phantom.finetune_siglip.epochs": 3,
    "phantom.finetune_siglip.warmup_steps": 3,
    "phantom.finetune_siglip.save_every": 2,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    parts = {"machines": soak_machines, "kills": soak_kills, "fuzz": soak_fuzz}
    content = {**circumstances(ROOT), "when": datetime.now(UTC).strftime("%Y-%m-%d")}
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            content[name] = parts[name](options, Path(folder))
        content[name]["hours"] = round((time.monotonic() - began) / 3600, 2)
    write_json(options.into / "soak.json", content)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    parts = ("machines", "kills", "fuzz")
    options.add_argument("--only", nargs="+", choices=parts, default=parts)
    options.add_argument("--kills", type=int, default=40, help="of the pipeline")
    options.add_argument("--examples", type=int, default=20_000, help="for each reader")
    options.add_argument("--seed", type=int, default=0, help="of moments and changes")
    options.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER")
    return options.parse_args(arguments)


# --- Machines --------------------------------------------------------------------------------


def soak_machines(options: argparse.Namespace, folder: Path) -> dict:
    """Raise ChestError if results differ between MACHINES; return what was compared."""
    first = None
    for number, (name, env) in enumerate(MACHINES.items()):
        clone = make_clone(folder / str(number))
        repro(clone, **env)
        if first is None:
            first = clone
            continue
        if different := differing(first, clone, "metrics", "plots"):
            raise ChestError(f"{name}: other bytes in {', '.join(different)}")
        if (most := largest_difference(first, clone)) >= 5e-5:
            raise ChestError(f"{name}: predictions differ by up to {most:g}")
    return {"compared": list(MACHINES)}


def largest_difference(one: Path, other: Path) -> float:
    """Return by how much the probabilities of two runs differ at most."""
    tables = [
        [pd.read_csv(path) for path in sorted((clone / "data/predictions").glob("*.csv"))]
        for clone in (one, other)
    ]
    pairs = zip(*tables, strict=True)
    return max(float(np.abs(a[list(LABELS)] - b[list(LABELS)]).max(axis=None)) for a, b in pairs)


# --- Kills -----------------------------------------------------------------------------------


def soak_kills(options: argparse.Namespace, folder: Path) -> dict:
    """Raise ChestError if a killed pipeline ends otherwise than an undisturbed one."""
    undisturbed, killed = (make_clone(folder / name, few=True) for name in ("peace", "war"))
    began = time.monotonic()
    repro(undisturbed)
    seconds = time.monotonic() - began
    rng, struck = random.Random(options.seed), 0
    while struck < options.kills:
        process = start_repro(killed)
        try:
            process.wait(rng.uniform(0, seconds / 4))
        except subprocess.TimeoutExpired:
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            os.killpg(process.pid, number)
            process.wait()
            struck += 1
        else:
            start_anew(killed, process.returncode)
    repro(killed)
    folders = ("metrics", "plots", "data/predictions")
    if different := differing(undisturbed, killed, *folders):
        raise ChestError(f"after {struck} kills: other bytes in {', '.join(different)}")
    return {"survived": struck, "compared": list(folders)}


def start_anew(clone: Path, code: int) -> None:
    """Let the pipeline run again from its first stage, since it came to its end."""
    if code:
        raise ChestError(f"dvc repro ended with {code} after a kill")
    for name in ("dvc.lock", ".dvc/cache", ".dvc/tmp"):
        subprocess.run(["rm", "-rf", name], cwd=clone, check=True)


# --- Fuzz ------------------------------------------------------------------------------------


def soak_fuzz(options: argparse.Namespace, folder: Path) -> dict:
    phantoms = folder / "phantom"
    draw_phantoms(phantoms)
    (folder / "changed").mkdir()
    os.chdir(ROOT)
    read = fuzz(phantoms, folder / "changed", options.examples, options.seed)
    return {"examples": options.examples, "read": read, "crashes": 0}


# --- Clones ----------------------------------------------------------------------------------


def make_clone(folder: Path, few: bool = False) -> Path:
    """Clone what is committed; with `few`, its phantoms are few and its training short."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    if few:
        for key, value in FEW.items():
            set_parameter(folder, key, value)
        draw_phantoms(folder / "data/raw/phantom")
        command = [sys.executable, "data/make_checkpoints.py"]
        subprocess.run(command, cwd=folder, check=True, env=environment(folder))
        (folder / "data/dvc.yaml").unlink()
        (folder / "dvc.lock").unlink()
    return folder


def set_parameter(clone: Path, key: str, value: object) -> None:
    import yaml

    path = clone / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    *parents, last = key.split(".")
    section = params
    for parent in parents:
        section = section[parent]
    section[last] = value
    path.write_text(yaml.safe_dump(params), encoding="utf-8")


def draw_phantoms(folder: Path) -> None:
    command = [sys.executable, "data/draw_phantoms.py", "--into", folder, "--scale", "0.1"]
    subprocess.run(command, cwd=ROOT, check=True)


def environment(clone: Path, **more: str) -> dict[str, str]:
    """Return an environment in which this Python runs the clone's own modules."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(clone), "DVC_NO_ANALYTICS": "1"}
    return {**os.environ, **own, **more}


def start_repro(clone: Path, **env: str) -> subprocess.Popen:
    log = (clone / ".repro.log").open("w")
    return subprocess.Popen(
        ["dvc", "repro"],
        cwd=clone,
        env=environment(clone, **env),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def repro(clone: Path, **env: str) -> None:
    if start_repro(clone, **env).wait():
        raise ChestError(f"dvc repro failed:\n{(clone / '.repro.log').read_text()[-5000:]}")


def differing(one: Path, other: Path, *folders: str) -> list[str]:
    """Return the files in `folders` that are not the same in both clones."""
    names = {
        path.relative_to(clone)
        for clone in (one, other)
        for folder in folders
        for path in (clone / folder).rglob("*")
        if path.is_file()
    }
    return [str(name) for name in sorted(names) if content(one / name) != content(other / name)]


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    run(main)
