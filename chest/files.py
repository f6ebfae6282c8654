"""Reading and writing files: an output appears whole or not at all."""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from chest.errors import InputError, Problem
from chest.running import deferring_signals

_waiting: list[Path] | None = None  # what is written already, where all is to appear at once

REMEDY = "run `dvc repro` to make it again"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; on success it takes `path`'s place.

    It is on the disk before it takes the place. Where the block raises, the unfinished file or
    folder is removed and `path` stays as it was. Within `together` it takes the place later.
    """
    path = Path(path)
    path = path.resolve() if path.is_dir() else path  # behind a link; one to a file is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)  # what a killed run left
    waits = False
    try:
        yield _partial(path)
        flush(_partial(path))
        if _waiting is None:
            _place(path)
        else:
            _waiting.append(path)
            waits = True
    finally:
        if not waits:
            _clear(path)


@contextmanager
def together() -> Iterator[None]:
    """All that is written in this block takes its place when it ends; where it raises, nothing."""
    global _waiting
    if _waiting is not None:  # within another one
        yield
        return
    _waiting = waiting = []
    try:
        yield
        with deferring_signals():
            for path in waiting:
                _place(path)
    finally:
        _waiting = None
        for path in waiting:
            _clear(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _place(path: Path) -> None:
    """Put what was written beside `path` into its place."""
    if _partial(path).is_dir() and (path.is_dir() or path.is_symlink()):
        os.replace(path, _old(path))  # a folder cannot be replaced by another one in one step
    os.replace(_partial(path), path)


def _clear(path: Path) -> None:
    """Remove what is unfinished, and put a folder back that made room for one that never came."""
    remove(_partial(path))
    if os.path.lexists(_old(path)) and not os.path.lexists(path):
        os.replace(_old(path), path)
    remove(_old(path))


def flush(path: Path) -> None:
    """Have the disk hold a file, or all files of a folder, before anything relies on them."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(path: str | Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write `table` as csv, UTF-8, without its index."""
    with replacing(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n", float_format=float_format)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented json with keys in their order."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def require_file(path: str | Path) -> None:
    """Raise OSError where `path` is no regular file: who reads a pipe may wait without end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("no regular file")


def read_json(path: str | Path, expected: str, remedy: str = REMEDY) -> dict:
    """Read one of the project's own json files, which holds a mapping and no NaN.

    Raises InputError, with what is `expected` and the `remedy`, where it is anything else.
    """
    try:
        require_file(path)
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError([Problem(path, str(error), expected, remedy)]) from None
    if not isinstance(content, dict):
        found = f"no mapping, but {type(content).__name__}"
        raise InputError([Problem(path, found, expected, remedy)])
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no number")


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read one of the project's own csv files: every value a string, exactly these columns.

    Raises InputError where the file is missing, is no csv, has other columns, or rows of another
    length.
    """
    expected = f"a csv file with the columns {','.join(columns)}"
    try:
        require_file(path)
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError([Problem(path, str(error), expected, REMEDY)]) from None
    if list(table.columns) != list(columns):
        found = f"the columns {','.join(table.columns)}"
        raise InputError([Problem(path, found, expected, REMEDY)])
    # pandas fills what a short row lacks, and takes what is too much for the rows' names.
    if table.isna().any(axis=None) or not isinstance(table.index, pd.RangeIndex):
        raise InputError([Problem(path, "a row of more or fewer fields", expected, REMEDY)])
    return table
