"""Answers of this run or of another: out of the working directory, a file, or a revision."""

import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import chdir, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from chest import predictions
from chest.dataset import MANIFEST, SPLIT, read_labelled
from chest.errors import InputError, Problem, refuse
from chest.systems import SYSTEMS

FORMS = f"{', '.join(SYSTEMS)}, a csv file, or REVISION:SYSTEM"


def read_all(*sources: str) -> list[pd.DataFrame]:
    """The answers of each of `sources`; raises InputError with all that is wrong."""
    tables, problems = [], []
    for source in sources:
        try:
            tables.append(read_answers(source))
        except InputError as error:
            problems += error.problems
    refuse(list(dict.fromkeys(problems)))
    return tables


def read_answers(source: str) -> pd.DataFrame:
    """The answers that `source` names, checked against their manifest and split.

    `source` is a system, a csv file, or ``revision:system`` (a Git revision or a DVC experiment,
    out of DVC's cache or remote). The columns are those of `predictions.describe`.
    """
    revision, _, system = source.rpartition(":")
    path = Path(source) if source.endswith(".csv") else predictions.path_of(source)
    if path.exists():
        return read_here(path.stem, path.parent)
    if revision and re.fullmatch(r"\w+", system):
        with laid_out(revision, system):
            return read_here(system, predictions.FOLDER)
    remedy = "run `dvc repro`, or correct the name"
    raise InputError([Problem(source, f"no file {path}", FORMS, remedy)])


def read_here(
    system: str, folder: Path, due: Collection[Sequence[str]] | None = None
) -> pd.DataFrame:
    """Predictions of the images of the working directory's manifest; `due` as in `read`."""
    labelled = read_labelled()
    return predictions.describe(predictions.read(system, labelled, folder, due), labelled)


@contextmanager
def laid_out(revision: str, system: str) -> Iterator[None]:
    """Work in a temporary folder with the predictions, manifest and split of `revision`.

    They lie where they do in the repository, so that they are read and checked as its files are;
    problems name the revision.
    """
    paths = (MANIFEST, SPLIT, predictions.path_of(system))
    contents = fetch(revision, paths)
    with tempfile.TemporaryDirectory() as folder:
        for path, content in zip(paths, contents, strict=True):
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(content)
        try:
            with chdir(folder):
                yield
        except InputError as error:
            remedy = f"check out {revision} and run `dvc repro` there"
            raise InputError(
                [replace(p, file=f"{revision}:{p.file}", remedy=remedy) for p in error.problems]
            ) from None


def fetch(revision: str, paths: tuple[Path, ...]) -> list[bytes]:
    """The files as of a Git revision or a DVC experiment, out of Git, DVC's cache or its remote."""
    contents, problems = [], []
    with opened(revision) as files:
        for path in paths:
            try:
                contents.append(files.read_bytes(path.as_posix()))
            except (DvcException, OSError) as error:
                found = f"cannot be read from DVC's cache or remote ({error})"
                remedy = f"check out {revision}, then `dvc fetch` or, without a remote, `dvc repro`"
                file, expected = f"{revision}:{path}", "a file of that revision"
                problems.append(Problem(file, found, expected, remedy))
    refuse(problems)
    return contents


@contextmanager
def opened(revision: str) -> Iterator[DVCFileSystem]:
    """The repository in the working directory as of `revision`."""
    with closing(DVCFileSystem(rev=revision)) as files:
        try:
            files.repo  # noqa: B018  it is opened only now
        except (DvcException, OSError) as error:
            expected = "a Git revision or DVC experiment of the repository in the working directory"
            problem = Problem(revision, str(error), expected, "see `git log` and `dvc exp show`")
            raise InputError([problem]) from None
        yield files
