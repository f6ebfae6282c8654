"""Reading and writing files. An output appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from chest.core.errors import InputError, Problem

REMEDY = "run `dvc repro` to make it again"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; move it to `path` on success.

    If the block raises, what was written is removed and `path` stays as it was. Files get the mode
    of the umask, whatever wrote them: safetensors makes its own private.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)  # left by a run that was killed
    try:
        yield partial
        _open_up(partial)
        if partial.is_dir():  # a folder does not replace another one in a single step
            remove(path)
        os.replace(partial, path)
    finally:
        remove(partial)


def _open_up(path: Path) -> None:
    """Give a file, or all files of a folder, the mode that `open` gives."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(path: str | Path, table: pd.DataFrame, float_format: str | None = None) -> None:
    """Write `table` as csv in UTF-8, without its index."""
    with replacing(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n", float_format=float_format)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, keys in their order."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read one of the project's own csv files: every value a string, exactly these columns.

    Raises InputError if the file is missing, is no csv, or has other columns.
    """
    expected = f"a csv file with the columns {','.join(columns)}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError([Problem(path, str(error), expected, REMEDY)]) from None
    if list(table.columns) != list(columns):
        found = f"the columns {','.join(table.columns)}"
        raise InputError([Problem(path, found, expected, REMEDY)])
    if not isinstance(table.index, pd.RangeIndex):  # pandas took a first field for the index
        raise InputError([Problem(path, "rows with more fields", expected, REMEDY)])
    return table
