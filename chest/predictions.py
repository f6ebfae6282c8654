"""``data/predictions/<system>.csv``: what a system answered, in one format for all systems."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chest.errors import InputError, Problem, refuse
from chest.files import read_table, write_json, write_table
from chest.labels import LABELS, UNPARSED

FOLDER = Path("data/predictions")
PROBES = FOLDER / "probes"
CURVES = Path("data/training")
TRAINED_MODEL = Path("models/finetune_siglip")  # the classifier that answered
COLUMNS = ("image_id", "split", "actual", "predicted", *LABELS)
CURVE_COLUMNS = ("epoch", "train_loss", "val_loss", "learning_rate", "val_uar", "val_war")
DESCRIBED = ("patient_id", "modality", "site")
PLACES = 6  # of the probabilities: more would differ from run to run on a GPU
ROUNDING = 2 / 10**PLACES  # by which three rounded probabilities may miss 1, and a little more
FREE_TEXT = ("zeroshot_qwen",)  # what answers in words, which may name no class

# What a record holds, and of what type. Its own keys tell whose record it is.
BY_MODEL = {
    "checkpoint": str, "revision": str, "seed": int, "device": str, "processes": int,
    "precision": str, "python": str, "torch": str, "transformers": str,
}  # fmt: skip
RECORDED = {
    "zeroshot_qwen": {**BY_MODEL, "method": str},
    "zeroshot_siglip": BY_MODEL,
    "finetune_siglip": {**BY_MODEL, "trained_on": int, "best_epoch": int, "temperature": float},
    "floor_modality": {"by": str},
    "floor_site": {"by": str},
}


def path_of(system: str, folder: Path = FOLDER) -> Path:
    """The predictions of `system`."""
    return folder / f"{system}.csv"


def record_path_of(system: str, folder: Path = FOLDER) -> Path:
    """How they came about: checkpoint, device, precision, seed, versions."""
    return folder / f"{system}.json"


def curve_path_of(system: str) -> Path:
    """How a trained system learned: CURVE_COLUMNS, one row an epoch."""
    return CURVES / f"{system}.csv"


def tabulate(table: pd.DataFrame, probabilities: Iterable[Sequence[float] | None]) -> pd.DataFrame:
    """The predictions of the images of `table` (columns image_id, split, label), n rows.

    `probabilities` holds those of each image in the order of LABELS; they are rounded, and the
    answer is the largest of the rounded ones (the first of equals), so that the file agrees with
    itself. None stands for an answer that names no class: it is unparsed, at equal shares.
    """
    given = list(probabilities)
    equal = [1 / len(LABELS)] * len(LABELS)
    rows = [equal if row is None else row for row in given]
    rounded = np.round(np.array(rows, np.float64).reshape(-1, len(LABELS)), PLACES)
    predicted = np.array(LABELS, dtype=object)[rounded.argmax(1)]
    predicted[[row is None for row in given]] = UNPARSED
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
    """The record that `write` wrote beside the predictions of `system`.

    Raises InputError where it is missing or torn, or is that of another system, or not of as many
    answers as there are.
    """
    path, remedy = record_path_of(system), f"run `dvc repro {system}` to make it again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError([Problem(path, str(error), "the record of a run", remedy)]) from None
    answers = len(read_table(path_of(system), COLUMNS))
    refuse([
        Problem(path, found, expected, remedy)
        for found, expected in _record_faults(system, record, answers)
    ])  # fmt: skip
    return record


def _record_faults(system: str, record: object, answers: int) -> list[tuple[str, str]]:
    """What is wrong with the record of `answers` answers of `system`: found and expected."""
    if not isinstance(record, dict):
        return [(f"no mapping, but {type(record).__name__}", "the record of a run")]
    due = {"weights": str, "n": int, **RECORDED.get(system, {})}
    faults = [
        (f"{key}: {json.dumps(record.get(key))}", kind.__name__)
        for key, kind in due.items()
        if type(record.get(key)) is not kind
    ]
    others = set().union(*RECORDED.values()) - set(due)
    strange = sorted(others & set(record)) if system in RECORDED else []
    if strange or ("by" in due and system != f"floor_{record.get('by')}"):
        found = f"the record of another system ({', '.join(strange) or record.get('by')})"
        faults.append((found, f"that of {system}"))
    if record.get("n") != answers:
        faults.append((f"a record of n = {json.dumps(record.get('n'))}", f"of {answers} answers"))
    return faults


def read_curve(system: str, best_epoch: int) -> pd.DataFrame:
    """How a trained system learned: CURVE_COLUMNS, numbers, one row an epoch from 1 upwards.

    Raises InputError where the file is torn, or has no `best_epoch`, which was kept.
    """
    path, remedy = curve_path_of(system), f"run `dvc repro {system}` to make it again"
    curve = read_table(path, CURVE_COLUMNS).apply(pd.to_numeric, errors="coerce")
    epochs = curve["epoch"].tolist()
    faults = []
    if not np.isfinite(curve.to_numpy(np.float64)).all() or epochs != list(
        range(1, len(epochs) + 1)
    ):
        faults.append(("rows that are no epochs", "finite numbers, epochs from 1 upwards"))
    if best_epoch not in epochs:
        found = f"no epoch {best_epoch}, which {record_path_of(system)} says was kept"
        faults.append((found, "a row for it"))
    refuse([Problem(path, found, expected, remedy) for found, expected in faults])
    return curve


def read(system: str, table: pd.DataFrame, folder: Path = FOLDER) -> pd.DataFrame:
    """Read and check the predictions of `system`; `table` is the manifest with the column `split`.

    Raises InputError where a split that it answers is not there as a whole, an image is unknown or
    there twice, a class or split is not the manifest's, probabilities are none, or a system that
    always names a class does not.
    """
    path = path_of(system, folder)
    predictions = read_table(path, COLUMNS)
    remedy = "run `dvc repro` to make it again"
    try:
        numbers = predictions[list(LABELS)].astype(np.float64)
    except ValueError as error:
        raise InputError([Problem(path, str(error), "probabilities", remedy)]) from None
    predictions[list(LABELS)] = numbers
    faults = _faults(predictions, table)
    # Elsewhere a file may be of whatever system and have whatever name.
    if folder in (FOLDER, PROBES) and system not in FREE_TEXT:
        unparsed = int((predictions["predicted"] == UNPARSED).sum())
        faults += [(f"{unparsed} {UNPARSED} answers", "a class, which it always names")] * (
            unparsed > 0
        )
    refuse([Problem(path, found, expected, remedy) for found, expected in faults])
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
    if len(due) != len(predictions):  # an image is there twice, here or in the manifest
        return faults or [("an image that the manifest lists twice", "each image once")]
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
    elif not (np.abs(numbers.sum(1) - 1) < ROUNDING).all():
        faults.append(("probabilities that do not add up to 1", "1 in each row"))
    elif unknown == set():
        parsed = (predictions["predicted"] != UNPARSED).to_numpy()
        best = np.array(LABELS, dtype=object)[numbers.argmax(1)]
        if (best != predictions["predicted"].to_numpy())[parsed].any():
            faults.append(("answers that are not the most probable class", "the most probable one"))
        if np.ptp(numbers[~parsed], axis=1).any():
            faults.append((f"{UNPARSED} answers that favour a class", "equal shares"))
    return faults
