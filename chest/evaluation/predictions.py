"""``data/predictions/<system>.csv`` and ``.json``: the answers of a system and how they were made.

Every system writes this format, and every file in the folder is a system: a new one needs no entry
in any list. What charts and tables need to know about it stands in its `Record`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from chest.core.errors import InputError, Problem, refuse
from chest.core.files import REMEDY, read_table, write_json, write_table
from chest.core.labels import LABELS, UNPARSED

FOLDER = Path("data/predictions")
CURVES = Path("data/training")
COLUMNS = ("image_id", "split", "actual", "predicted", *LABELS)
DESCRIBED = ("patient_id", "modality", "collection", "site", "study")  # added from the manifest
CURVE_COLUMNS = (
    *("epoch", "train_loss", "val_loss", "learning_rate"),
    *("val_uar", "val_war", "val_within", "val_worst"),
)
KINDS = ("trained", "zero-shot", "blind")  # in the order of tables and charts
PLACES = 6  # of the probabilities: more would differ from run to run on a GPU
TOLERANCE = 2 / 10**PLACES  # by how much three rounded probabilities may miss a sum of 1

Name = Annotated[str, StringConstraints(min_length=1, max_length=60, pattern=r"^[^<>|`\n\r]+$")]


class Record(BaseModel):
    """How a system's answers were made. ``name`` is what charts and tables call it.

    ``n`` is the number of answers. ``details`` holds what only this system has to tell: the epoch
    that was kept, the temperature, the number of training images, and so on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    kind: Literal["trained", "zero-shot", "blind"]
    n: Annotated[int, Field(ge=1)]
    weights: Literal["none", "random", "pretrained"] = "none"
    seed: int | None = None
    checkpoint: str | None = None
    revision: str | None = None
    commit: str | None = None
    device: str | None = None
    processes: int | None = None
    precision: str | None = None
    versions: dict[str, str] = {}
    details: dict[str, str | int | float | None] = {}

    @property
    def display_name(self) -> str:
        """The name, with a note if the system started from random weights."""
        if self.weights != "random":
            return self.name
        how = "trained from random weights" if self.kind == "trained" else "random weights"
        return f"{self.name} ({how})"


@dataclass(frozen=True)
class System:
    """A system's answers with what is known about each image.

    ``answers``: one row per image, sorted by image_id, with COLUMNS (probabilities as floats) and
    DESCRIBED.
    """

    key: str
    record: Record
    answers: pd.DataFrame

    @property
    def name(self) -> str:
        return self.record.display_name

    @property
    def splits(self) -> set[str]:
        return set(self.answers["split"])

    def of(self, split: str) -> pd.DataFrame:
        """Return the answers of one split; no rows if the system did not answer it."""
        return self.answers[self.answers["split"] == split].reset_index(drop=True)


def part_of(answers: pd.DataFrame, split: str, modality: str | None = None) -> pd.DataFrame:
    """Return the answers to the images of a split, or of a modality in it."""
    chosen = answers["split"] == split
    return answers[chosen if modality is None else chosen & (answers["modality"] == modality)]


def tabulate(rows: pd.DataFrame, probabilities: Iterable[Sequence[float] | None]) -> pd.DataFrame:
    """Return the predictions table of `rows` (columns image_id, split, label).

    `probabilities` has one item per row: three numbers in the order of LABELS, or None for an
    answer that names no class (unparsed, equal probabilities). They are rounded first, and the
    prediction is the largest of the rounded ones, the first of equals: so the file agrees with
    itself. Raises InputError if a probability is not finite.
    """
    given = list(probabilities)
    equal = [1 / len(LABELS)] * len(LABELS)
    values = [equal if row is None else row for row in given]
    rounded = np.round(np.array(values, np.float64).reshape(-1, len(LABELS)), PLACES)
    bad = rows["image_id"].to_numpy()[~np.isfinite(rounded).all(axis=1)]
    if len(bad):
        found = f"probabilities that are not finite ({len(bad):,} of {len(rounded):,} images)"
        remedy = "check the checkpoint's weights and the learning rate; try precision fp32"
        refuse([Problem(f"the answer to {bad[0]}", found, "numbers from 0 to 1", remedy)])
    predicted = np.array(LABELS, dtype=object)[rounded.argmax(axis=1)]
    predicted[[row is None for row in given]] = UNPARSED
    columns = {"image_id": rows["image_id"], "split": rows["split"], "actual": rows["label"]}
    table = pd.DataFrame({name: column.to_numpy() for name, column in columns.items()})
    table = table.assign(predicted=predicted, **dict(zip(LABELS, rounded.T, strict=True)))
    return table.sort_values("image_id", ignore_index=True)


def write(system: str, table: pd.DataFrame, record: Record, folder: Path = FOLDER) -> None:
    """Write a table made by `tabulate` and the record beside it."""
    write_table(folder / f"{system}.csv", table, float_format=f"%.{PLACES}f")
    write_json(folder / f"{system}.json", record.model_dump())


def read_systems(labelled: pd.DataFrame, folder: Path = FOLDER) -> dict[str, System]:
    """Read every system in `folder`: trained ones first, then zero-shot, then blind; by key.

    `labelled` is the manifest with the column ``split``. Raises InputError with all problems of all
    files; one is a file that no stage of ``dvc.yaml`` writes, left over from an earlier version.
    """
    systems, problems = [], []
    keys = sorted(path.stem for path in folder.glob("*.csv"))
    if not keys:
        problems.append(Problem(folder, "no predictions", "a csv file per system", REMEDY))
    declared = _declared_outputs() if folder == FOLDER else None
    for key in keys:
        if declared is not None and folder / f"{key}.csv" not in declared:
            found, expected = "predictions of no stage", "an output of a stage in dvc.yaml"
            remedy = "remove this file and its .json: the stage that wrote it is gone"
            problems.append(Problem(folder / f"{key}.csv", found, expected, remedy))
            continue
        try:
            systems.append(read_system(key, labelled, folder))
        except InputError as error:
            problems += error.problems
    refuse(problems)
    systems.sort(key=lambda system: KINDS.index(system.record.kind))  # stable: by key within
    return {system.key: system for system in systems}


def read_system(key: str, labelled: pd.DataFrame, folder: Path = FOLDER) -> System:
    """Read one system; `labelled` is the manifest with the column ``split``.

    Raises InputError if a file is missing or damaged, or the two do not belong together.
    """
    answers = read_answers_file(folder / f"{key}.csv", labelled)
    record = read_record(folder / f"{key}.json")
    if record.n != len(answers):
        found, expected = f"a record of n = {record.n}", f"{len(answers)}, as in {key}.csv"
        refuse([Problem(folder / f"{key}.json", found, expected, REMEDY)])
    return System(key, record, answers)


def read_record(path: Path) -> Record:
    """Read the record of a system; raises InputError if it is missing or damaged."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = Problem(path, " ".join(str(error).split()), "the record of a system", REMEDY)
        raise InputError([problem]) from None


def read_answers_file(path: Path, labelled: pd.DataFrame) -> pd.DataFrame:
    """Read a predictions file from any place, checked against the manifest; see `System.answers`.

    Raises InputError if a split that it answers is incomplete, an image is unknown or in the wrong
    split or class, or the probabilities or predictions cannot be right.
    """
    table = read_table(path, COLUMNS)
    for label in LABELS:
        table[label] = pd.to_numeric(table[label], errors="coerce")
    faults = _image_faults(table, labelled) or _answer_faults(table)
    refuse([Problem(path, found, expected, REMEDY) for found, expected in faults])
    return table.merge(labelled[["image_id", *DESCRIBED]], on="image_id", validate="one_to_one")


def read_curve(system: System) -> pd.DataFrame | None:
    """Return the training curve (CURVE_COLUMNS, one row per epoch); None if the system has none.

    Raises InputError if the file is damaged or lacks the epoch that the record says was kept.
    """
    path = CURVES / f"{system.key}.csv"
    if not path.exists():
        return None
    curve = read_table(path, CURVE_COLUMNS).apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(curve).all(axis=None) or [*curve["epoch"]] != [*range(1, len(curve) + 1)]:
        refuse([Problem(path, "rows that are no epochs", "numbers, epochs from 1", REMEDY)])
    best = system.record.details.get("best_epoch")
    if best is not None and not 1 <= best <= len(curve):
        refuse([Problem(path, f"{len(curve)} epochs", f"the kept epoch {best}", REMEDY)])
    return curve


def _image_faults(table: pd.DataFrame, labelled: pd.DataFrame) -> list[tuple[str, str]]:
    """Compare images, splits and classes with the manifest; return pairs (found, expected)."""
    splits = set(table["split"])
    expected = labelled[labelled["split"].isin(splits)]
    names = ", ".join(sorted(splits)) or "at least one split"
    if table.empty or len(table) != len(expected):
        return [(f"{len(table)} answers", f"{len(expected)}: every image of {names} once")]
    for column, source in (("image_id", "image_id"), ("split", "split"), ("actual", "label")):
        other = table[column].to_numpy() != expected[source].to_numpy()
        if other.any():
            found = (
                f"another {column} in {other.sum()} rows, first {table['image_id'][other].iloc[0]}"
            )
            return [(found, f"those of {names} in data/manifest.csv and split, in its order")]
    return []


def _answer_faults(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Check probabilities and predictions; return pairs (found, expected)."""
    values = table[list(LABELS)].to_numpy()
    unparsed = (table["predicted"] == UNPARSED).to_numpy()
    best = np.where(unparsed, UNPARSED, np.array(LABELS, dtype=object)[values.argmax(axis=1)])
    rules = (
        ((values >= 0) & (values <= 1)).all(axis=1),  # False for NaN, too
        np.abs(values.sum(axis=1) - 1) < TOLERANCE,
        best == table["predicted"].to_numpy(),
    )
    names = ("probabilities from 0 to 1", "probabilities that sum to 1", "the most probable class")
    for holds, name in zip(rules, names, strict=True):
        if not holds.all():
            row = table[~holds].iloc[0]
            return [(f"{row['image_id']}: {row['predicted']}, {[*row[list(LABELS)]]}", name)]
    return []


def _declared_outputs() -> set[Path] | None:
    """Return the outputs of all stages in ``dvc.yaml``; None outside a DVC repository."""
    if not Path("dvc.yaml").exists():
        return None
    from dvc.exceptions import NotDvcRepoError  # slow to import; only `evaluate` needs it
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            outs = [Path(out.fs_path) for out in repo.index.outs if out.protocol == "local"]
    except NotDvcRepoError:
        return None
    here = Path.cwd()
    return {out.relative_to(here) for out in outs if out.is_relative_to(here)}
