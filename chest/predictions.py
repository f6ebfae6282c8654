"""``data/predictions/<system>.csv``: what a system answered, in one format for all systems."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chest.dataset import is_plain
from chest.errors import InputError, Problem, refuse
from chest.files import REMEDY, read_json, read_table, together, write_json, write_table
from chest.labels import LABELS, SPLITS, UNPARSED

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

# The splits that a file answers: one of these sets of them.
TEST = (("test",),)  # that of a probe too
HELD_OUT = (("val", "test"),)
ANSWERED = {
    "zeroshot_qwen": (*TEST, SPLITS),
    "zeroshot_siglip": (*TEST, SPLITS),
    "finetune_siglip": HELD_OUT,
    "floor_modality": HELD_OUT,
    "floor_site": HELD_OUT,
}

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
OPTIONAL = {"commit": str, "accelerate": str, "numpy": str, "scikit-learn": str}  # of a model
WEIGHTS = ("pretrained", "random")  # of a model; a floor has none


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

    Raises InputError where a probability is no finite number.
    """
    given = list(probabilities)
    equal = [1 / len(LABELS)] * len(LABELS)
    rows = [equal if row is None else row for row in given]
    rounded = np.round(np.array(rows, np.float64).reshape(-1, len(LABELS)), PLACES)
    faulty = table["image_id"].to_numpy()[~np.isfinite(rounded).all(1)]
    if len(faulty):
        found = f"no finite probabilities ({len(faulty):,} of {len(rounded):,} images)"
        remedy = "see that the checkpoint's weights and normalisation hold numbers; fetch it again"
        raise InputError([Problem(f"the answer to {faulty[0]}", found, "numbers", remedy)])
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
    with together():
        write_table(path_of(system, folder), predictions, float_format=f"%.{PLACES}f")
        write_json(record_path_of(system, folder), record)


def read_record(system: str, folder: Path = FOLDER) -> dict:
    """The record that `write` wrote beside the predictions of `system`.

    Raises InputError where it is missing or torn, or is that of another system, or not of as many
    answers as there are, or holds what no record does.
    """
    path = record_path_of(system, folder)
    record = read_json(path, "the record of a run")
    answers = len(read_table(path_of(system, folder), COLUMNS))
    own = BY_MODEL if folder == PROBES else RECORDED.get(system, {})
    refuse([
        Problem(path, found, expected, REMEDY)
        for found, expected in _record_faults(system, record, answers, own)
    ])  # fmt: skip
    return record


def _record_faults(
    system: str, record: dict, answers: int, own: Mapping[str, type]
) -> list[tuple[str, str]]:
    """What is wrong with the record of `answers` answers of `system`: found and expected.

    `own` are the keys that it has beside `weights` and `n`, and their types.
    """
    due = {"weights": str, "n": int, **own}
    optional = OPTIONAL if "checkpoint" in own else {}
    faults = [
        (f"{key}: {_shown(record.get(key))}", EXPECTED[kind])
        for key, kind in (due | {key: optional[key] for key in optional if key in record}).items()
        if not _fits(record.get(key), kind) and (key, record.get(key)) != ("commit", None)
    ]
    strange = sorted(set(record) - {*due, *optional})
    if strange or ("by" in due and system != f"floor_{record.get('by')}"):
        found = (
            f"the record of another system ({', '.join(strange)[:80] or _shown(record.get('by'))})"
        )
        faults.append((found, f"that of {system}: {', '.join((*due, *optional))}"))
    weights = WEIGHTS if optional else ("none",) if own else (*WEIGHTS, "none")
    if record.get("weights") not in weights:
        faults.append((f"weights: {_shown(record.get('weights'))}", " or ".join(weights)))
    if record.get("n") != answers:
        faults.append((f"a record of n = {_shown(record.get('n'))}", f"of {answers} answers"))
    return faults


EXPECTED = {
    str: "str: one line of text without < and >",
    int: "int, not negative",
    float: "float, finite and not negative",
}


def _fits(value: object, kind: type) -> bool:
    """Whether `value` is as EXPECTED has it."""
    if type(value) is not kind:
        return False
    if kind is str:
        return bool(value) and is_plain(value) and not {*value} & {*"<>"}
    return 0 <= value < float("inf")


def _shown(value: object) -> str:
    """A value of a json file as it stands there; of others the type, for they may be endless."""
    return type(value).__name__ if isinstance(value, list | dict) else json.dumps(value)[:80]


def read_curve(system: str, best_epoch: int) -> pd.DataFrame:
    """How a trained system learned: CURVE_COLUMNS, numbers, one row an epoch from 1 upwards.

    Raises InputError where the file is torn, or has no `best_epoch`, which was kept.
    """
    path = curve_path_of(system)
    curve = numbers_of(read_table(path, CURVE_COLUMNS))
    faults = []
    if curve is None:
        expected = "finite numbers, epochs from 1 upwards, UAR and WAR from 0 to 1"
        faults.append(("rows that are no epochs", expected))
    elif best_epoch not in curve["epoch"].tolist():
        found = f"no epoch {best_epoch}, which {record_path_of(system)} says was kept"
        faults.append((found, "a row for it"))
    refuse([Problem(path, found, expected, REMEDY) for found, expected in faults])
    return curve


def numbers_of(curve: pd.DataFrame) -> pd.DataFrame | None:
    """`curve`, strings of CURVE_COLUMNS, as numbers; None where they are those of no training."""
    numbers = curve.apply(pd.to_numeric, errors="coerce")
    values, shares = numbers.to_numpy(np.float64), numbers[["val_uar", "val_war"]]
    counted = numbers["epoch"].tolist() == list(range(1, len(numbers) + 1))
    possible = np.isfinite(values).all() and (values >= 0).all() and (shares <= 1).all(axis=None)
    return numbers if counted and possible else None


def read(
    system: str,
    table: pd.DataFrame,
    folder: Path = FOLDER,
    due: Collection[Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Read and check the predictions of `system`; `table` is the manifest with the column `split`.

    Raises InputError where a split that it answers is not there as a whole, an image is unknown or
    there twice, a class or split is not the manifest's, probabilities are none, or a system that
    always names a class does not; with `due` also where it answers none of these sets of splits.
    """
    path = path_of(system, folder)
    predictions = read_table(path, COLUMNS)
    try:
        numbers = predictions[list(LABELS)].astype(np.float64)
    except ValueError as error:
        raise InputError([Problem(path, str(error), "probabilities", REMEDY)]) from None
    predictions[list(LABELS)] = numbers
    faults = _faults(predictions, table)
    answered = set(predictions["split"])
    if due is not None and answered not in map(set, due):
        expected = ", or ".join(" and ".join(splits) for splits in due)
        faults.append((f"answers of {' and '.join(sorted(answered)) or 'no split'}", expected))
    # Elsewhere a file may be of whatever system and have whatever name.
    if folder in (FOLDER, PROBES) and system not in FREE_TEXT:
        unparsed = int((predictions["predicted"] == UNPARSED).sum())
        faults += [(f"{unparsed} {UNPARSED} answers", "a class, which it always names")] * (
            unparsed > 0
        )
    refuse([Problem(path, found, expected, REMEDY) for found, expected in faults])
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
