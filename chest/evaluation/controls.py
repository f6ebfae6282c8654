"""``data/controls/<system>.csv``: what a vision-language model answers under other conditions.

The condition ``asked`` is the answer that the predictions hold. The others:

``no_image``      the question alone
``other_image``   the image of another patient, of the same modality
``order_...``     the classes in another order
``paraphrase_n``  the question in other words
``prior_...``     the question itself with each way of correcting for the model's favourite words

A result that is as good without its image is no result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.files import read_table, write_table
from chest.core.labels import LABELS
from chest.evaluation import predictions
from chest.evaluation.predictions import DESCRIBED, PLACES, Record, tabulate

FOLDER = Path("data/controls")
ASKED = "asked"
COLUMNS = ("image_id", "split", "condition", "actual", "predicted", *LABELS, "covered")

# By condition: class probabilities of each image, or None, and the probability of all answers.
Replies = Mapping[str, tuple[Sequence[Sequence[float] | None], np.ndarray]]


def write_answers(system: str, rows: pd.DataFrame, replies: Replies, record: Record) -> None:
    """Write the predictions of `system`, and its answers to `rows` in every other condition.

    `rows` has the columns image_id, split and label. The record tells the probability of all
    answers, averaged over the images.
    """
    answers, own = replies[ASKED]
    details = record.details | {"covered": round(float(np.mean(own)), PLACES)}
    record = record.model_copy(update={"details": details})
    predictions.write(system, tabulate(rows, answers), record)
    write_controls(system, rows, replies)


def write_controls(system: str, rows: pd.DataFrame, replies: Replies) -> None:
    """Write the answers to `rows` in every condition."""
    tables = [
        tabulate(rows, answers)
        .merge(pd.DataFrame({"image_id": rows["image_id"], "covered": covered}), on="image_id")
        .assign(condition=condition)
        for condition, (answers, covered) in replies.items()
    ]
    table = pd.concat(tables)[list(COLUMNS)]
    write_table(FOLDER / f"{system}.csv", table, float_format=f"%.{PLACES}f")


def read_controls(system: str, labelled: pd.DataFrame) -> pd.DataFrame | None:
    """Read COLUMNS and, from the manifest, DESCRIBED; None if the system has no controls."""
    path = FOLDER / f"{system}.csv"
    if not path.exists():
        return None
    table = read_table(path, COLUMNS)
    numbers = [*LABELS, "covered"]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table.merge(labelled[["image_id", *DESCRIBED]], on="image_id", validate="many_to_one")
