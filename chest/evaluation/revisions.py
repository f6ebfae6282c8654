"""``metrics/answers.csv``: the answers of all systems in one Git-tracked table.

With it, two runs can be compared from Git alone, without DVC's cache or remote. One row per test
and external image: image_id, patient_id, split, modality, collection, site, actual, and three
columns per system:

``<system>``               the answer: c (COVID-19), n (normal), t (tuberculosis), u (unparsed)
``<system>.covid19``       its probability in 1/10,000; that of normal is the rest
``<system>.tuberculosis``  likewise

A system that did not answer an image has empty cells.
"""

import io
import subprocess
from pathlib import Path

import pandas as pd

from chest.core.errors import InputError, Problem, refuse
from chest.core.files import write_table
from chest.core.labels import EVALUATED, LABELS, UNPARSED
from chest.data.dataset import read_labelled
from chest.evaluation import predictions
from chest.evaluation.predictions import System, read_answers_file

ANSWERS = Path("metrics/answers.csv")
IMAGE_COLUMNS = ("image_id", "patient_id", "split", "modality", "collection", "site", "actual")
LETTERS = {name: name[0] for name in (*LABELS, UNPARSED)}
UNIT = 10_000  # probabilities are stored in 1/UNIT
STORED = ("covid19", "tuberculosis")
FORMS = "a system, REVISION:SYSTEM, or a csv file"


def write_answers(path: Path, systems: dict[str, System]) -> None:
    """Write the answers of `systems` to the test and external images; see the module."""
    tables = []
    for key, system in systems.items():
        rows = system.answers[system.answers["split"].isin(EVALUATED)]
        columns = {key: rows["predicted"].map(LETTERS)}
        for label in STORED:
            columns[f"{key}.{label}"] = (rows[label] * UNIT).round().astype(int).astype(str)
        images = rows[list(IMAGE_COLUMNS)]
        tables.append(images.assign(**columns).set_index(list(IMAGE_COLUMNS)))
    table = pd.concat(tables, axis=1).fillna("").reset_index()
    write_table(path, table.sort_values("image_id"))


def read_answers(source: str) -> pd.DataFrame:
    """Return the answers that `source` names: IMAGE_COLUMNS, predicted, and three probabilities.

    `source` is one of

    ``SYSTEM``           of the working tree: data/predictions, or else metrics/answers.csv
    ``REVISION:SYSTEM``  of metrics/answers.csv in a Git revision or DVC experiment
    ``FOLDER/FILE.csv``  a predictions file, of the images of data/manifest.csv

    Raises InputError if there are no such answers.
    """
    path = Path(source) if source.endswith(".csv") else predictions.FOLDER / f"{source}.csv"
    if path.exists():
        return read_answers_file(path, read_labelled())
    revision, _, system = source.rpartition(":")
    systems = {} if source.endswith(".csv") else read_tracked(revision or None)
    if system not in systems:
        remedy = f"choose one of {', '.join(systems)}" if systems else "correct the path"
        raise InputError([Problem(source, "no such answers", FORMS, remedy)])
    return systems[system]


def read_all(*sources: str) -> list[pd.DataFrame]:
    """Return the answers of each of `sources`; raises InputError with all that is wrong."""
    tables, problems = [], []
    for source in sources:
        try:
            tables.append(read_answers(source))
        except InputError as error:
            problems += error.problems
    refuse(dict.fromkeys(problems))
    return tables


def read_tracked(revision: str | None = None) -> dict[str, pd.DataFrame]:
    """Return the answers of each system in metrics/answers.csv, as `read_answers` does.

    `revision` is a Git revision or DVC experiment, None the working tree. Raises InputError if
    there is no such revision or file, or it is damaged.
    """
    name = f"{revision}:{ANSWERS}" if revision else str(ANSWERS)
    try:
        content = show(revision, ANSWERS) if revision else ANSWERS.read_bytes()
    except (OSError, subprocess.CalledProcessError) as error:
        found = getattr(error, "stderr", None) or str(error).encode()
        remedy = "run `dvc repro`; see `git log` and `dvc exp show` for revisions that have it"
        expected = "a file that `evaluate` wrote and Git tracks"
        raise InputError([Problem(name, found.decode().strip(), expected, remedy)]) from None
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        systems = [x for x in table.columns if x not in IMAGE_COLUMNS and "." not in x]
        return {system: _unpack(system, table) for system in systems}
    except (ValueError, KeyError) as error:
        expected, remedy = "answers as `evaluate` writes them", "run `dvc repro evaluate`"
        raise InputError([Problem(name, str(error), expected, remedy)]) from None


def resolve(revision: str) -> str:
    """Return what Git calls `revision`: the ref of a DVC experiment, or `revision` itself."""
    command = ["git", "for-each-ref", "--format=%(refname)", "refs/exps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refs = done.stdout.split()
    return next((ref for ref in refs if ref.endswith(f"/{revision}")), revision)


def show(revision: str, path: str | Path) -> bytes:
    """Return a file of a Git revision or DVC experiment; raises CalledProcessError without it."""
    command = ["git", "show", "--end-of-options", f"{resolve(revision)}:./{path}"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def _unpack(system: str, table: pd.DataFrame) -> pd.DataFrame:
    """Return the answers of one system; raises ValueError or KeyError if they cannot be right."""
    rows = table[table[system] != ""].reset_index(drop=True)
    stored = {label: rows[f"{system}.{label}"].astype(int) for label in STORED}
    stored["normal"] = UNIT - sum(stored.values())
    predicted = rows[system].map({letter: name for name, letter in LETTERS.items()})
    probabilities = pd.DataFrame({label: stored[label] / UNIT for label in LABELS})
    # Two that were rounded up may leave a little less than nothing.
    bad = predicted.isna() | (probabilities < -1 / UNIT).any(axis=1)
    if bad.any():
        raise ValueError(f"{system}: the answer to {rows['image_id'][bad].iloc[0]}")
    images = rows[list(IMAGE_COLUMNS)].assign(predicted=predicted)
    return pd.concat([images, probabilities.clip(lower=0)], axis=1)
