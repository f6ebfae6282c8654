"""Run the study on real lungs: films and CT slices, within hospitals and across them.

    python tools/real.py data/raw/study --checkpoint google/efficientnet-b0
    python tools/real.py data/raw/study --full                  on a GPU
    python tools/real.py data/raw/study --only hospitals
    python tools/real.py data/raw/study --plan
    python tools/real.py data/raw/study --report

DATA is a folder with two of the three collections, COVID19_1110 and chest-x-ray-lungs-segmentation.
The checkpoint is an EfficientNet in the format of transformers: a folder, or a name on the hub.

Each run executes stages of the pipeline in a folder of its own below --into, with a params.yaml of
its own. Runs share what they can: packed images, splits, lung masks, features. As many run at a
time as there are cores, one thread each, also on a GPU, of which each takes about 1 GiB. Without
--full, trainings are short and few enough for three hours on two cores. The order is that of
importance, so a report can be made at any time; Ctrl-C ends cleanly, and the same command goes on:
a run that is there is repeated only if its parameters, data or code changed. --plan shows what
would run, and how long that takes.

Writes  <into>/<run>/           params.yaml, log.txt, data/predictions, data/training, done.json
        docs/results.md         the report, and the ten lines between the marks in README.md
        docs/results/           its tables (csv) and charts
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import yaml
from real_plan import Run, plan
from tqdm import tqdm

from chest.core.errors import ChestError
from chest.core.files import read_table, remove, write_json, write_table, write_text
from chest.core.parallel import workers
from chest.core.runtime import parser, run_tool
from chest.core.tables import markdown
from chest.data.dataset import MANIFEST_COLUMNS, SPLIT_COLUMNS
from chest.reporting import results
from chest.reporting.real_runs import DONE, PLANNED

ROOT = Path(__file__).resolve().parents[1]
COLLECTIONS = ("COVID19_1110", "chest-x-ray-lungs-segmentation")
# What a finished run leaves behind and no report reads.
BULK = ("models", ".resume", "live")


class RealError(ChestError):
    """A run that failed, or data that are not there."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    runs = plan(options.checkpoint, options.full)
    chosen = needed(runs, options.only)
    if options.plan:
        print(budget(chosen, options.jobs))
        return
    study = Study(options.data, options.into, runs)
    try:
        if not options.report:
            execute(study, chosen, options.jobs)
    finally:
        write_json(options.into / PLANNED, study.planned())
        command = "python tools/real.py DATA --checkpoint CHECKPOINT" + " --full" * options.full
        results.report(options.into, Path("docs"), Path("README.md"), command)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("data", type=Path, metavar="DATA")
    add = command.add_argument
    add("--checkpoint", default="google/efficientnet-b0", help="default: %(default)s")
    add("--into", type=Path, help="default: data/real, with --full data/real-full")
    add("--only", metavar="PART", help="one part of the plan, with what it needs")
    add("--full", action="store_true", help="longer trainings, and more of them: for a GPU")
    add("--jobs", type=int, default=workers(), help="runs at a time (default: one per core)")
    add("--plan", action="store_true", help="only show the plan")
    add("--report", action="store_true", help="only report what is there")
    options = command.parse_args(arguments)
    missing = [name for name in COLLECTIONS if not (options.data / name).is_dir()]
    if missing:
        raise RealError(f"{options.data}: no folder {' and no folder '.join(missing)}")
    options.into = options.into or Path("data/real-full" if options.full else "data/real")
    if Path(options.checkpoint).is_dir():
        options.checkpoint = str(Path(options.checkpoint).resolve())
    return options


def needed(runs: Sequence[Run], part: str | None) -> list[Run]:
    """Return the runs of a part, or of all, with those that they need, in order."""
    by_name = {run.name: run for run in runs}
    names = {run.name for run in runs if run.part and part in (None, run.part)}
    if not names:
        raise RealError(f"--only {part}: the parts are {', '.join(parts(runs))}")
    waiting = [*names]
    while waiting:
        more = {*by_name[waiting.pop()].links.values()} - names
        names |= more
        waiting += more
    return [run for run in runs if run.name in names]


def parts(runs: Iterable[Run]) -> list[str]:
    return [*dict.fromkeys(run.part for run in runs if run.part)]


def budget(runs: Sequence[Run], jobs: int) -> str:
    """Return a table of runs and expected minutes by part."""
    rows = []
    for part in ["", *parts(runs)]:
        own = [run for run in runs if run.part == part]
        minutes = sum(run.cost for run in own) / 60 / jobs
        rows.append([part or "what the others need", str(len(own)), f"{minutes:.0f}"])
    total = sum(run.cost for run in runs) / 60 / jobs
    rows.append(["all", str(len(runs)), f"{total:.0f}"])
    return markdown(["part", "runs", f"minutes of a CPU, {jobs} at a time"], rows)


# --- One run ---------------------------------------------------------------------------------


@dataclass
class Study:
    """Where the runs of a plan take place, and which of them are done."""

    data: Path
    into: Path
    runs: Sequence[Run]
    processes: set[subprocess.Popen] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.by_name = {run.name: run for run in self.runs}
        self.digests: dict[str, str] = {}

    def digest(self, run: Run) -> str:
        """Return a digest of all that the outputs of `run` depend on."""
        if run.name not in self.digests:
            content = settings(run)
            parents = {self.digest(self.by_name[name]) for name in run.links.values()}
            parts = [run.stages, run.thin, sorted(parents), *map(code_digest, run.stages)]
            parts += [picked(content, stage) for stage in run.stages]
            parts += [listing(self.data.resolve())] if run.raw else []
            self.digests[run.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.digests[run.name]

    def done(self, run: Run) -> bool:
        path = self.into / run.name / DONE
        return path.exists() and json.loads(path.read_text())["digest"] == self.digest(run)

    def planned(self) -> list[dict]:
        """Return the labels of all runs for the report, and where those are that are done."""
        return [
            run.labels | {"done": run.name if self.done(run) else None}
            for run in self.runs
            if run.labels
        ]

    def make(self, run: Run) -> float:
        """Execute the stages of `run` in its folder; return the seconds that it took.

        An interrupted run of the same digest resumes, another one starts anew.
        """
        folder, start = self.into / run.name, time.monotonic()
        digest = folder / "digest"
        if not digest.exists() or digest.read_text() != self.digest(run):
            remove(folder)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_text(digest, self.digest(run))
        write_text(folder / "params.yaml", yaml.safe_dump(settings(run), sort_keys=False))
        self.link(run, folder)
        for stage in run.stages:
            self.call(stage, folder)
        if run.thin is not None:
            thin(folder, run.thin)
        for name in BULK:
            remove(folder / name)
        seconds = round(time.monotonic() - start, 1)
        write_json(
            folder / DONE,
            {"digest": self.digest(run), "seconds": seconds, "commit": commit(), **run.labels},
        )
        return seconds

    def link(self, run: Run, folder: Path) -> None:
        """Link what other runs made, and the collections."""
        targets = {path: self.into / name / path for path, name in run.links.items()}
        if run.raw:
            targets[f"data/raw/{settings(run)['profile']}"] = self.data
        for path, target in targets.items():
            remove(folder / path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(target.resolve())

    def call(self, stage: Sequence[str], folder: Path) -> None:
        """Run a stage in `folder`; raises RealError with the end of its log if it fails."""
        script, *arguments = stage
        command = [sys.executable, str(ROOT / script), *arguments]
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            if self.stopping.is_set():
                raise RealError("stopped")
            # A session of its own: a Ctrl-C must reach it once, not twice.
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code:
            told = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            raise RealError(f"{script} failed in {folder}:\n{told[-1500:].strip()}")

    def stop(self) -> None:
        """End what runs; trainings save their state."""
        self.stopping.set()
        for process in [*self.processes]:
            process.terminate()


def settings(run: Run) -> dict:
    """Return params.yaml with the changes of `run`; raises KeyError for a key that is not there."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in run.params.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if last not in place:
            raise KeyError(key)
        place[last] = value
    return content


def thin(folder: Path, keep: int) -> None:
    """Leave `keep` tuberculosis images to training; the others become external, that is, tested.

    The order of the images is random, with the seed of the split.
    """
    path = folder / "data/split.csv"
    manifest = read_table(folder / "data/manifest.csv", MANIFEST_COLUMNS)
    split = read_table(path, SPLIT_COLUMNS)
    trained = (split["split"] == "train") & (manifest["label"] == "tuberculosis")
    rows = pd.Series(split.index[trained]).sample(frac=1, random_state=0)
    split.loc[rows.iloc[keep:], "split"] = "external"
    write_table(path, split)


# --- What a run depends on -------------------------------------------------------------------


@cache
def declared(script: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the code and the parameters that a stage depends on, as dvc.yaml declares them."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if script.startswith("data/"):
        return (script, "chest/core"), ()
    stage = stages[Path(script).stem]
    stage = stage.get("do", stage)
    code = tuple(path for path in stage["deps"] if path.startswith(("stages/", "chest/")))
    return code, tuple(stage.get("params", ()))


@cache
def code_digest(stage: tuple[str, ...]) -> str:
    """Return a digest of the code of a stage."""
    total = hashlib.sha256()
    for name in declared(stage[0])[0]:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(file.read_bytes())
    return total.hexdigest()


def picked(content: dict, stage: tuple[str, ...]) -> list:
    """Return the values in `content` that a stage reads."""
    values = []
    for name in declared(stage[0])[1]:
        place = content
        name = name.replace("${profile}", content["profile"]).replace("${item}", stage[-1])
        for part in name.split("."):
            place = place[part]
        values.append(place)
        if isinstance(place, dict) and "checkpoint" in place:
            values.append(weights_digest(Path(place["checkpoint"])))
    return values


@cache
def weights_digest(folder: Path) -> list[str]:
    """Return the digests of the weights in a checkpoint's folder."""
    files = sorted(folder.glob("*.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@cache
def listing(data: Path) -> str:
    """Return names and sizes of the files of the collections."""
    files = sorted(path for name in COLLECTIONS for path in (data / name).rglob("*"))
    return str([(str(path.relative_to(data)), path.stat().st_size) for path in files])


def commit() -> str:
    """Return the commit of the code, with a + if the code differs from it; empty outside Git."""
    command = ("git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*")
    no_locks = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=no_locks)
    return done.stdout.strip()


# --- All runs --------------------------------------------------------------------------------


def execute(study: Study, runs: Sequence[Run], jobs: int) -> None:
    """Make all `runs` that are not done, `jobs` at a time, each after those that it needs.

    A failed run stops those that need it, not the others; raises RealError at the end.
    """
    todo = [run for run in runs if not study.done(run)]
    clock = Clock(len(runs) - len(todo), len(runs), jobs, sum(run.cost for run in todo))
    failures: dict[str, str] = {}
    working: dict[Future, Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while todo or working:
                start_ready(study, pool, todo, working, failures, jobs)
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    run = working.pop(future)
                    try:
                        clock.tell(run, future.result())
                    except RealError as error:
                        failures[run.name] = str(error)
                        print(f"{run.name} failed", file=sys.stderr, flush=True)
        except BaseException:
            study.stop()
            raise
    if failures:
        raise RealError("\n\n".join(failures.values()))


def start_ready(
    study: Study,
    pool: ThreadPoolExecutor,
    todo: list[Run],
    working: dict[Future, Run],
    failures: dict[str, str],
    jobs: int,
) -> None:
    """Start the first of `todo` whose needs are met, up to `jobs`; drop those that cannot run."""
    for run in [*todo]:
        needs = {*run.links.values()}
        if needs & {*failures}:
            failures[run.name] = f"{run.name}: needs {', '.join(sorted(needs & {*failures}))}"
            todo.remove(run)
        elif len(working) < jobs and not needs & {x.name for x in (*todo, *working.values())}:
            working[pool.submit(study.make, run)] = run
            todo.remove(run)


@dataclass
class Clock:
    """Counts finished runs and estimates the time left from what they took."""

    count: int
    total: int
    jobs: int
    left: float
    expected: float = 0.0
    taken: float = 0.0

    def tell(self, run: Run, seconds: float) -> None:
        """Print that `run` is done after `seconds`."""
        self.count += 1
        self.left -= run.cost
        self.expected, self.taken = self.expected + run.cost, self.taken + seconds
        left = tqdm.format_interval(self.left * self.taken / self.expected / self.jobs)
        print(
            f"[{self.count}/{self.total}] {run.name}: {seconds:.0f} s; about {left} left",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    run_tool(main)
