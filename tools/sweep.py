"""Run variations over several seeds, and report the mean and spread of each in one table.

Each run is a DVC experiment (`dvc exp show` lists them as sweep-…). One that is already there is
not run again, so that an interrupted sweep goes on where it was. The runs take place in the working
directory, which must hold no uncommitted change, and is put back at the end; a signal ends the run
that is under way first.

    python tools/sweep.py --seeds 1 2 3
    python tools/sweep.py --seeds 1 2 3 --vary split.group=patient,image
    python tools/sweep.py --seeds 1 2 3 --vary phantom.finetune_siglip.lr=5.0e-4,1.0e-3,2.0e-3
    python tools/sweep.py --seeds 1 2 3 -S profile=study --vary study.finetune_siglip.lr=1e-5,2e-5

A metric is named as `dvc metrics show` names it. The spread is the standard deviation between seeds
(n - 1): a seed changes the split, the sampler and the new weights alike. With --pool the answers of
all seeds are put together, and the 95 % intervals are by a bootstrap over patients: the doubt that
comes of the images at hand.
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import dvc.api
import numpy as np
import pandas as pd
from dvc.exceptions import DvcException

from chest.commands import parser
from chest.errors import ChestError, run
from chest.files import remove, write_json
from chest.intervals import Interval, intervals
from chest.revisions import read_answers
from chest.running import WORK, deferring_signals
from chest.systems import SYSTEMS
from chest.tables import markdown
from chest.within import score_modalities

METRICS = (
    "finetune_siglip.uar",
    "finetune_siglip.within.ct.uar",
    "finetune_siglip.within.xray.uar",
    "finetune_siglip.recall.tuberculosis",
)
UNDERWAY = WORK / "sweep.json"  # there while the working directory is not put back
PATIENCE = 8.0  # seconds that a run gets for tidying up before it is killed


class SweepError(ChestError):
    """A sweep that cannot be started, or a run of it that failed."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    variations = [tuple(v) for v in itertools.product(*map(split_variation, options.vary))]
    check_clean()
    write_json(UNDERWAY, {"commit": head()})
    try:
        names = {
            (variation, seed): run_experiment([*options.set, *variation, f"seed={seed}"])
            for variation in variations
            for seed in options.seeds
        }
    finally:
        restore()
    print(tabulate(names, options))
    if options.pool:
        print()
        print(tabulate_pooled(names, options))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    command.add_argument(
        "--vary", action="append", default=[], metavar="KEY=A,B",
        help="a parameter and its values; given several times: every combination",
    )  # fmt: skip
    command.add_argument(
        "-S", "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a parameter of all runs",
    )  # fmt: skip
    command.add_argument(
        "--metric", action="append", metavar="NAME", help=f"default: {', '.join(METRICS)}"
    )
    command.add_argument(
        "--pool", choices=SYSTEMS, metavar="SYSTEM",
        help="also the system's figures over the answers of all seeds, with 95 %% intervals",
    )  # fmt: skip
    options = command.parse_args(arguments)
    if len(set(options.seeds)) < len(options.seeds):
        command.error("a seed twice")
    return options


def split_variation(text: str) -> list[str]:
    """``key=a,b`` as ``key=a`` and ``key=b``."""
    key, equals, values = text.partition("=")
    if not (key and equals and all(values.split(","))):
        raise SweepError(f"--vary {text}: expected KEY=VALUE,VALUE")
    return [f"{key}={value}" for value in values.split(",")]


# --- Running ---------------------------------------------------------------------------------


def run_experiment(changes: list[str]) -> str:
    """Run the pipeline with `changes` as a DVC experiment, unless it was; returns its name.

    The name holds a digest of the changes and of the commit that they change.
    """
    digest = hashlib.sha256(json.dumps([head(), sorted(changes)]).encode()).hexdigest()
    name = f"sweep-{digest[:10]}"
    known = call("dvc", "exp", "list", "--name-only").split()
    print(f"{name}: {', '.join(changes)}{' (was run)' if name in known else ''}", file=sys.stderr)
    if name not in known:
        settings = [part for change in changes for part in ("--set-param", change)]
        call("dvc", "exp", "run", "--quiet", "--name", name, *settings)
    return name


def check_clean() -> None:
    """Raise SweepError where the working directory holds what a run would overwrite."""
    changed = call("git", "status", "--porcelain", "--untracked-files=no")
    if not changed:
        return
    advice = "commit or stash them first"
    with suppress(OSError, ValueError):
        if json.loads(UNDERWAY.read_text(encoding="utf-8")) == {"commit": head()}:
            # Not done here: what has been edited by hand since would be lost.
            advice = (
                "a sweep was killed before it could put them back. Once no run of it is left, do:\n"
                + "".join(f"    {' '.join(command)}\n" for command in RESTORING)
                + "which also drops what was edited since"
            )
    raise SweepError(f"uncommitted changes; {advice}:\n{changed.rstrip()}")


def head() -> str:
    return call("git", "rev-parse", "HEAD").strip()


RESTORING = (
    ("git", "checkout", "--quiet", "HEAD", "--", "."),  # the index too: a run may stage files
    ("dvc", "checkout", "--quiet", "--force", "--allow-missing"),
)


def restore() -> None:
    """Put the working directory back to its commit."""
    for command in RESTORING:
        call(*command)
    remove(UNDERWAY)


def call(*command: str) -> str:
    """What a command printed; raises SweepError, with what it said, where it failed.

    It is a session of its own, which ends with this call, however that ends.
    """
    # The environment's own dvc and python, whether it is activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    try:
        printed, errors = process.communicate()
    except BaseException:
        with deferring_signals():
            end(process)
        raise
    if process.returncode:
        raise SweepError(f"`{' '.join(command)}` failed:\n{(errors or printed).strip()}")
    return printed


def end(process: subprocess.Popen) -> None:
    """End a command with all that it started: DVC's stage would go on without it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        # It waits until the last one that could print is gone.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PATIENCE)
            return


# --- Reporting -------------------------------------------------------------------------------


def tabulate(names: dict, options: argparse.Namespace) -> str:
    """A Markdown table: a line for each variation, mean ± standard deviation of each metric."""
    metrics = options.metric or METRICS
    rows = []
    for variation, runs in by_variation(names).items():
        found = [read_metrics(name) for name in runs]
        values = np.array([[look_up(one, metric) for metric in metrics] for one in found])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(metrics), np.nan)
        cells = [spell(mean, sd) for mean, sd in zip(values.mean(axis=0), spread, strict=True)]
        rows.append([describe(variation), *cells])
    seeds = ", ".join(map(str, options.seeds))
    return markdown([f"seeds {seeds}", *metrics], rows)


def tabulate_pooled(names: dict, options: argparse.Namespace) -> str:
    """A Markdown table of recalls and UAR within each modality over the answers of all seeds."""
    rows = []
    for variation, runs in by_variation(names).items():
        table = pd.concat([of_test(f"{name}:{options.pool}") for name in runs], ignore_index=True)
        cells = {
            f"{group.name} {figure}": spell_interval(interval)
            for group in score_modalities(table, options.seeds[0])
            if group.found
            for figure, interval in {"UAR": group.found.uar, **group.found.recall}.items()
        }
        cells["all UAR"] = spell_interval(intervals(table, options.seeds[0]).uar)
        rows.append(
            {"pooled over seeds": describe(variation), "answers": f"{len(table):,}", **cells}
        )
    table = pd.DataFrame(rows).fillna("-")
    return markdown(list(table.columns), table.to_numpy().tolist())


def of_test(source: str) -> pd.DataFrame:
    """The answers of a system to the test split, with patient_id, modality and site."""
    answers = read_answers(source)
    return answers[answers["split"] == "test"]


def by_variation(names: dict) -> dict[tuple, list[str]]:
    return {
        variation: [name for (other, _), name in names.items() if other == variation]
        for variation, _ in names
    }


def read_metrics(name: str) -> dict:
    """The metrics of an experiment, of all files, as one nested dict."""
    try:
        found = dvc.api.metrics_show(rev=name)
    except DvcException as error:
        raise SweepError(f"{name}: its metrics cannot be read ({error})") from None
    merged: dict = {}
    for key, value in found.items():
        # A key that several files have (a system) is prefixed with the file: `metrics/test.json:a`.
        merge(merged, {key.rpartition(":")[2]: value})
    return merged


def merge(into: dict, nested: dict) -> None:
    """Add the leaves of `nested` to `into`."""
    for key, value in nested.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def look_up(metrics: dict, name: str) -> float:
    """The metric with a dotted `name`; raises SweepError where there is none."""
    value = metrics
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, float | int):
        raise SweepError(f"no metric {name}; see `dvc metrics show`")
    return float(value)


def describe(variation: tuple[str, ...]) -> str:
    """The last part of each key and its value: ``balance=none, lr=1e-3``."""
    pairs = (change.partition("=")[::2] for change in variation)
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs) or "as committed"


def spell(mean: float, spread: float) -> str:
    return f"{mean:.3f}" if np.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def spell_interval(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    run(main)
