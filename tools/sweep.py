"""Run the pipeline several times as DVC experiments, and report all runs in one table.

    python tools/sweep.py --seeds 1 2 3
    python tools/sweep.py --seeds 1 2 3 --vary phantom.finetune_siglip.lr=5.0e-4,1.0e-3
    python tools/sweep.py --seeds 1 2 3 -S profile=study --vary study.finetune_siglip.lr=1e-5,2e-5
    python tools/sweep.py --folds 5
    python tools/sweep.py --leave-one-site-out

--seeds runs every combination of the varied parameters with every seed, on the same split, and
chooses the setting with the best mean on validation. Test figures are printed for that setting
only, with intervals that hold the noise of patients and of seeds; --show-test prints all.

--folds tests every image once, in cross-validation by patient, and scores the pooled answers.
--leave-one-site-out trains once without each site that has both classes of a modality.

A run that is already there (`dvc exp show` lists them as sweep-…) is not repeated, so an
interrupted sweep continues. The runs take place in the working directory, which must hold no
uncommitted change and is put back at the end.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from chest.core.errors import ChestError
from chest.core.labels import DISEASES, EVALUATED, LABELS, MODALITY_NAMES
from chest.core.params import load_params
from chest.core.runtime import deferred_interrupts, parser, run_tool
from chest.core.tables import markdown
from chest.evaluation.comparison import pooled
from chest.evaluation.intervals import Interval
from chest.evaluation.predictions import part_of
from chest.evaluation.revisions import read_answers, read_tracked, show

# Validation figures of the training curve, and whether more is better.
CRITERIA = {"within": True, "uar": True, "worst": True, "loss": False}
SHOWN = "UAR of ALL settings on test images, shown on request: no choice may rest on it."
MEANS = "Means over the runs; 95 % intervals over patients and runs."
PATIENCE = 8.0  # seconds that a run gets to clean up before it is killed
RESTORE = (
    ("git", "checkout", "--quiet", "HEAD", "--", "."),
    ("dvc", "checkout", "--quiet", "--force", "--allow-missing"),
)


class SweepError(ChestError):
    """A sweep that cannot be started, or a run of it that failed."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    with restored():
        if options.folds:
            print(cross_validate(options))
        elif options.leave_one_site_out:
            print(leave_sites_out(options))
        else:
            print(choose(options))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    plan = command.add_mutually_exclusive_group(required=True)
    plan.add_argument("--seeds", type=int, nargs="+", metavar="N")
    plan.add_argument("--folds", type=int, metavar="K")
    plan.add_argument("--leave-one-site-out", action="store_true")
    add, several = command.add_argument, {"action": "append", "default": []}
    add("--vary", **several, metavar="KEY=A,B", help="values of a parameter; may be repeated")
    add("-S", "--set", **several, metavar="KEY=VALUE", help="a parameter of all runs")
    add("--system", help="default: evaluation.primary of params.yaml")
    add("--choose-by", choices=CRITERIA, default="within", help="default: %(default)s")
    add("--show-test", action="store_true", help="test figures of all settings")
    options = command.parse_args(arguments)
    if options.vary and not options.seeds:
        command.error("--vary goes with --seeds")
    params = load_params()
    seed = params.section("split", dict)["seed"]
    options.split_seed = params.seed if seed is None else seed
    options.system = options.system or params.section("evaluation", dict)["primary"]
    return options


# --- The three plans -------------------------------------------------------------------------


def choose(options: argparse.Namespace) -> str:
    """Run all settings with all seeds; report the validation figures and the chosen setting."""
    split = f"split.seed={options.split_seed}"  # all runs test the same patients
    runs = {
        describe(setting): [
            run_experiment([*options.set, split, *setting, f"seed={n}"]) for n in options.seeds
        ]
        for setting in itertools.product(*map(split_variation, options.vary))
    }
    figures = {
        name: pd.DataFrame([validation(ref, options.system) for ref in refs])
        for name, refs in runs.items()
    }
    column, sign = f"val_{options.choose_by}", 1 if CRITERIA[options.choose_by] else -1
    best = max(runs, key=lambda name: sign * figures[name][column].mean())
    rows = [[name, *map(spread, table.to_numpy().T)] for name, table in figures.items()]
    tables = {
        name: [read_answers(f"{ref}:{options.system}") for ref in refs]
        for name, refs in runs.items()
        if options.show_test or name == best
    }
    return f"""\
Validation figures of {options.system}, mean ± standard deviation over seeds {options.seeds}:

{markdown(["setting", *figures[best].columns], rows)}

Chosen by {column}: {best}

{SHOWN if options.show_test else "UAR of the chosen setting on test images:"} {MEANS}

{tabulate("setting", tables, options.seeds[0])}"""


def cross_validate(options: argparse.Namespace) -> str:
    """Run all folds; score the pooled answers of each system, every image tested once."""
    plan = [[f"split.folds={options.folds}", f"split.fold={k}"] for k in range(options.folds)]
    answers = [read_tracked(run_experiment([*options.set, *changes])) for changes in plan]
    tables = {
        system: pd.concat([part_of(own[system], "test") for own in answers])
        for system in answers[0]
    }
    if any(table["image_id"].duplicated().any() for table in tables.values()):
        raise SweepError("the folds share test images: is the split by fold broken?")
    title = f"Answers of {options.folds} folds, pooled: every image was tested once."
    return f"{title}\n\n{tabulate('system', {k: [table] for k, table in tables.items()}, 0)}"


def leave_sites_out(options: argparse.Namespace) -> str:
    """Run once without each site; report the internal and the external UAR within modality."""
    rows = []
    for site in two_class_sites(run_experiment(options.set)):
        quoted = site.replace("\\", "\\\\").replace("'", "\\'")
        ref = run_experiment([*options.set, f"split.external=['{quoted}']"])
        answers = read_answers(f"{ref}:{options.system}")
        for modality, disease in DISEASES.items():
            inside, outside = (part_of(answers, split, modality) for split in EVALUATED)
            if {*outside["actual"]} >= {"normal", disease}:
                sizes = f"{len(outside):,}", f"{outside['patient_id'].nunique():,}"
                uars = spell(pooled(inside, 0).uar), spell(pooled(outside, 0).uar)
                rows.append([site, MODALITY_NAMES[modality], *sizes, *uars])
    head = ["site held out", "modality", "images", "patients", "internal UAR", "external UAR"]
    title = f"{options.system} trained without each site, then tested there:"
    return f"{title}\n\n{markdown(head, rows)}"


def two_class_sites(ref: str) -> list[str]:
    """Return the sites with normal and diseased images of a modality, by metrics/audit.csv.

    A site without which a class would have no image left is skipped, with a note.
    """
    table = pd.read_csv(io.BytesIO(show(ref, "metrics/audit.csv")), keep_default_na=False)
    table = table[table["label"].isin(LABELS)]  # without the total
    modality = table["collection"].map(lambda name: "xray" if name == "xrays" else "ct")
    mixed = table.groupby(["site", modality])["label"].nunique().groupby("site").max() > 1
    sites = []
    for site in mixed.index[mixed]:
        lost = {*table["label"]} - {*table.loc[table["site"] != site, "label"]}
        if lost:
            print(f"{site} is not held out: it alone has {', '.join(lost)}", file=sys.stderr)
        else:
            sites.append(site)
    return sites


# --- Running ---------------------------------------------------------------------------------


def run_experiment(changes: Sequence[str]) -> str:
    """Run the pipeline with `changes` as a DVC experiment, unless it was; return its Git ref.

    The experiment's name is a digest of the changes and of the commit that they change.
    """
    head = call("git", "rev-parse", "HEAD").strip()
    digest = hashlib.sha256(json.dumps([head, sorted(changes)]).encode()).hexdigest()
    name = f"sweep-{digest[:10]}"
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    done = bool(call("git", "for-each-ref", ref))
    print(f"{name}: {', '.join(changes)}{' (done before)' if done else ''}", file=sys.stderr)
    if not done:
        settings = [part for change in changes for part in ("--set-param", change)]
        call("dvc", "exp", "run", "--quiet", "--name", name, *settings)
    return ref


@contextmanager
def restored() -> Iterator[None]:
    """Refuse a working directory with uncommitted changes; put it back to its commit at the end."""
    changed = call("git", "status", "--porcelain", "--untracked-files=no").rstrip()
    if changed:
        commands = "\n".join(f"    {' '.join(command)}" for command in RESTORE)
        raise SweepError(
            f"uncommitted changes; commit or stash them first:\n{changed}\n"
            f"If they are those of a sweep that was killed, drop them:\n{commands}"
        )
    try:
        yield
    finally:
        with deferred_interrupts():
            for command in RESTORE:
                call(*command)


def call(*command: str) -> str:
    """Return what a command prints; raises SweepError with its message if it fails.

    The command gets its own session, which ends with this call, however that ends.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": path},  # this environment's dvc and python
    )
    try:
        printed, errors = process.communicate()
    except BaseException:
        with deferred_interrupts():
            end(process)
        raise
    if process.returncode:
        raise SweepError(f"`{' '.join(command)}` failed:\n{(errors or printed).strip()}")
    return printed


def end(process: subprocess.Popen) -> None:
    """End a command and all that it started: DVC's stage would run on without it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=PATIENCE)
            return


# --- Reporting -------------------------------------------------------------------------------


def validation(ref: str, system: str) -> dict[str, float]:
    """Return the validation figures of the epoch that a trained system kept, and the epoch."""
    record = json.loads(show(ref, "metrics/runs.json"))[system]
    kept = record["details"].get("best_epoch")
    if kept is None:
        raise SweepError(f"{system} keeps no epoch: name a trained system with --system")
    curve = pd.read_csv(io.BytesIO(show(ref, f"plots/training/{system}.csv")))
    row = curve.set_index("epoch").loc[kept]
    return {f"val_{name}": row[f"val_{name}"] for name in CRITERIA} | {"epoch": float(kept)}


def tabulate(title: str, tables: dict[str, list[pd.DataFrame]], seed: int) -> str:
    """Return a Markdown table: a row per item, UAR on test and external, also within modality.

    Figures are means over the runs of an item; the intervals hold the noise of patients and runs.
    """
    rows = []
    headings = {**MODALITY_NAMES, None: "all"}
    for name, runs in tables.items():
        row = {title: name, "runs": str(len(runs))}
        for split, modality in itertools.product(EVALUATED, headings):
            parts = [part_of(table, split, modality) for table in runs]
            if parts[0]["actual"].nunique() > 1:
                row[f"{split}: {headings[modality]}"] = spell(pooled(parts, seed).uar)
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")
    return markdown([*table.columns], table.to_numpy().tolist())


def split_variation(text: str) -> list[str]:
    """Return ``key=a,b`` as ``key=a`` and ``key=b``."""
    key, equals, values = text.partition("=")
    if not (key and equals and all(values.split(","))):
        raise SweepError(f"--vary {text}: KEY=VALUE,VALUE expected")
    return [f"{key}={value}" for value in values.split(",")]


def describe(setting: Sequence[str]) -> str:
    """Return the last part of each key with its value: ``balance=none, lr=1e-3``."""
    pairs = (change.split("=", 1) for change in setting)
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs) or "as committed"


def spread(values: Sequence[float]) -> str:
    mean = f"{values.mean():.3f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.3f}"


def spell(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    run_tool(main)
