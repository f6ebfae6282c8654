"""``data/predictions/<system>.csv``: what a system answered, in one format for all systems."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from chest.errors import InputError, Problem, refuse
from chest.files import read_table, write_json, write_table
from chest.labels import LABELS, UNPARSED

FOLDER = Path("data/predictions")
PROBES = FOLDER / "probes"
CURVES = Path("data/training")
COLUMNS = ("image_id", "split", "actual", "predicted", *LABELS)
CURVE_COLUMNS = ("epoch", "train_loss", "val_loss", "learning_rate", "val_uar", "val_war")
DESCRIBED = ("patient_id", "modality", "site")
PLACES = 6  # of the probabilities: more would differ from run to run on a GPU


def path_of(system: str, folder: Path = FOLDER) -> Path:
    """The predictions of `system`."""
    return folder / f"{system}.csv"


def record_path_of(system: str, folder: Path = FOLDER) -> Path:
    """How they came about: checkpoint, device, precision, seed, versions."""
    return folder / f"{system}.json"


def curve_path_of(system: str) -> Path:
    """How a trained system learned: CURVE_COLUMNS, one row an epoch."""
    return CURVES / f"{system}.csv"


def tabulate(
    table: pd.DataFrame, probabilities: np.ndarray, unparsed: np.ndarray | None = None
) -> pd.DataFrame:
    """The predictions of the images of `table` (columns image_id, split, label), n rows.

    `probabilities` is (n, 3) in the order of LABELS; each row is rounded, and the answer is the
    largest of the rounded ones (the first of equals), so that the file agrees with itself. Rows
    where `unparsed`, bool (n,), is true answer none of the classes.
    """
    rounded = np.round(np.asarray(probabilities, np.float64), PLACES)
    predicted = np.array(LABELS, dtype=object)[rounded.argmax(1)]
    if unparsed is not None:
        predicted[unparsed] = UNPARSED
    result = pd.DataFrame(
        {
            "image_id": table["image_id"].to_numpy(),
            "split": table["split"].to_numpy(),
            "actual": table["label"].to_numpy(),
            "predicted": predicted,
            **dict(zip(LABELS, rounded.T, strict=True)),
        }
    )
    return result.sort_values("image_id", ignore_index=True)


def write(system: str, predictions: pd.DataFrame, record: dict, folder: Path = FOLDER) -> None:
    """Write the predictions of `system` and the record of how they came about."""
    write_table(path_of(system, folder), predictions, float_format=f"%.{PLACES}f")
    write_json(record_path_of(system, folder), record)


def read_record(system: str) -> dict:
    """The record that `write` wrote."""
    path = record_path_of(system)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"run `dvc repro {system}` to make it again"
        raise InputError([Problem(path, str(error), "the record of a run", remedy)]) from None


def read(system: str, table: pd.DataFrame, folder: Path = FOLDER) -> pd.DataFrame:
    """Read and check the predictions of `system`; `table` is the manifest with the column `split`.

    Raises InputError where a split that it answers is not there as a whole, an image is unknown or
    there twice, a class or split is not the manifest's, or probabilities are none.
    """
    path = path_of(system, folder)
    predictions = read_table(path, COLUMNS)
    remedy = "run `dvc repro` to make it again"
    try:
        numbers = predictions[list(LABELS)].astype(np.float64)
    except ValueError as error:
        raise InputError([Problem(path, str(error), "probabilities", remedy)]) from None
    predictions[list(LABELS)] = numbers
    refuse([
        Problem(path, found, expected, remedy)
        for found, expected in _faults(predictions, table)
    ])  # fmt: skip
    return predictions


def describe(predictions: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """`predictions` with patient_id, modality and site of each image; `table` is the manifest."""
    return predictions.merge(table[["image_id", *DESCRIBED]], on="image_id")


def _faults(predictions: pd.DataFrame, table: pd.DataFrame) -> list[tuple[str, str]]:
    """What is wrong with `predictions`, as pairs of what was found and what was expected."""
    faults = []
    images = predictions["image_id"]
    if not images.is_monotonic_increasing or images.duplicated().any():
        faults.append(("images doubled or not in order", "each image once, sorted by image_id"))
    answered = set(predictions["split"])
    due = table.loc[table["split"].isin(answered), "image_id"]
    if not answered or set(images) != set(due):
        unknown, missing = set(images) - set(due), set(due) - set(images)
        faults.append(
            (
                f"{len(missing)} images missing, {len(unknown)} that do not belong"
                f" ({', '.join(sorted(missing | unknown)[:3])})",
                f"all images of {', '.join(sorted(answered)) or 'a split'}",
            )
        )
        return faults
    true = table.set_index("image_id").loc[images]
    for column, source in (("split", "split"), ("actual", "label")):
        wrong = images[predictions[column].to_numpy() != true[source].to_numpy()]
        if len(wrong):
            faults.append((f"another {column} of {', '.join(wrong[:3])}", "those of the tables"))
    unknown = set(predictions["predicted"]) - {*LABELS, UNPARSED}
    if unknown:
        faults.append((f"the answer {min(unknown)!r}", f"{', '.join(LABELS)} or {UNPARSED}"))
    numbers = predictions[list(LABELS)].to_numpy()
    if not (np.isfinite(numbers).all() and ((numbers >= 0) & (numbers <= 1)).all()):
        faults.append(("numbers that are no probabilities", "from 0 to 1"))
    elif not (np.abs(numbers.sum(1) - 1) < 1e-5).all():
        faults.append(("probabilities that do not add up to 1", "1 in each row"))
    elif unknown == set():
        parsed = (predictions["predicted"] != UNPARSED).to_numpy()
        best = np.array(LABELS, dtype=object)[numbers.argmax(1)]
        if (best != predictions["predicted"].to_numpy())[parsed].any():
            faults.append(("answers that are not the most probable class", "the most probable one"))
    return faults
