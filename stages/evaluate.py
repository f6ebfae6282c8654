"""Score what the systems answered on the test split, and draw it.

Reads   data/predictions/*, data/training/finetune_siglip.csv, data/manifest.csv, data/images.npy,
        data/split.csv
Writes  metrics/test.json   of each system, on the test split: UAR, WAR, macro averages, and recall,
                            precision and F1 of each class
        metrics/all.json    the same over all images, for systems that answered all of them
        metrics/runs.json   how each came about: checkpoint, commit, device, n, seed, versions
        plots/*.csv         what `dvc plots` draws: confusion_<system>, recall, training
        plots/*.png         the same drawn: confusion, recall, training
        plots/sheets/       pictures that show images of the collections (never in Git): a contact
                            sheet, and the worst mistakes of the fine-tuned system

All metrics come from the predictions' files, none from weights: this stage alone writes what Git
tracks, and needs no GPU.

    python stages/evaluate.py        (or: dvc repro evaluate)
"""

from pathlib import Path

import numpy as np
import pandas as pd

from chest import predictions
from chest.charts import (
    draw_confusions,
    draw_contact_sheet,
    draw_mistakes,
    draw_recalls,
    draw_training,
)
from chest.dataset import Dataset, read_dataset
from chest.errors import InputError, Problem, run
from chest.files import read_table, replacing, write_json, write_table
from chest.labels import SPLITS, SYSTEM_NAMES, SYSTEMS
from chest.metrics import classification_metrics, rounded
from chest.params import load_params
from chest.predictions import CURVE_COLUMNS, curve_path_of

METRICS = Path("metrics")
PLOTS = Path("plots")
TRAINED = "finetune_siglip"

NOTES = {
    "phantom": "Drawn phantoms: no image of a person.",
    "study": "Images of the published collections. They show patients: do not publish.",
}


def main() -> None:
    params = load_params()
    data = read_dataset()
    records = {system: predictions.read_record(system) for system in SYSTEMS}
    answers = {system: predictions.read(system, data.table) for system in SYSTEMS}
    test = {system: of_split(system, table, "test") for system, table in answers.items()}
    names = {system: display_name(system, record) for system, record in records.items()}
    curve = read_table(curve_path_of(TRAINED), CURVE_COLUMNS).apply(pd.to_numeric)

    # 1. Metrics.
    write_json(METRICS / "test.json", score(test))
    complete = {s: table for s, table in answers.items() if set(table["split"]) == set(SPLITS)}
    write_json(METRICS / "all.json", score(complete))
    write_json(METRICS / "runs.json", records)

    # 2. What `dvc plots` draws.
    for system, table in test.items():
        write_table(PLOTS / f"confusion_{system}.csv", table[["actual", "predicted"]])
    recalls = tabulate_recalls(test)
    write_table(PLOTS / "recall.csv", recalls)
    write_table(PLOTS / "training.csv", curve)

    # 3. Charts, and pictures that show images.
    draw_confusions(PLOTS / "confusion.png", test, names)
    draw_recalls(PLOTS / "recall.png", recalls, names)
    draw_training(PLOTS / "training.png", curve, records[TRAINED]["best_epoch"])
    with replacing(PLOTS / "sheets") as folder:
        folder.mkdir()
        note = NOTES[params.profile]
        draw_contact_sheet(folder / "contact_sheet.png", data.images, data.table, note)
        wrong = worst_mistakes(test[TRAINED], data)
        title = f"{names[TRAINED]}: {len(wrong)} of {len(test[TRAINED])} test images wrong. {note}"
        draw_mistakes(folder / "mistakes.png", data.images, wrong, title)


def of_split(system: str, table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The answers of one split; raises InputError where there are none."""
    chosen = table[table["split"] == split]
    if chosen.empty:
        path, remedy = predictions.path_of(system), f"run `dvc repro {system}` to make it again"
        raise InputError([Problem(path, f"no answer of {split}", "all of its images", remedy)])
    return chosen


def display_name(system: str, record: dict) -> str:
    """As charts name it; what came out of random weights says so."""
    if record["weights"] != "random":
        return SYSTEM_NAMES[system]
    how = "trained from random weights" if system == TRAINED else "random weights"
    return f"{SYSTEM_NAMES[system]} ({how})"


def score(answers: dict[str, pd.DataFrame]) -> dict:
    """The metrics of each system, floats of 4 places."""
    return {
        system: rounded(classification_metrics(table["actual"], table["predicted"]))
        for system, table in answers.items()
    }


def tabulate_recalls(answers: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row for each system and class: its recall (4 places), and how many images it is of.

    ``bar`` names both: in `dvc plots` a bar has one name, the same in every revision.
    """
    rows = [
        {"system": system, "class": label, "recall": recall,
         "n": int((table["actual"] == label).sum()),
         "bar": f"{system}: {label}"}
        for system, table in answers.items()
        for label, recall in score({system: table})[system]["recall"].items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def worst_mistakes(table: pd.DataFrame, data: Dataset) -> pd.DataFrame:
    """Wrong answers, the truth's least probable first: what `draw_mistakes` reads."""
    row_of = pd.Series(np.arange(len(data.table)), data.table["image_id"])
    rows = row_of[table["image_id"]].to_numpy()
    listed = table.assign(
        row=rows,
        probability=[row.get(row["predicted"], np.nan) for row in table.to_dict("records")],
        truth=[row[row["actual"]] for row in table.to_dict("records")],
        site=data.table["site"].to_numpy()[rows],
    )
    wrong = listed[listed["actual"] != listed["predicted"]]
    return wrong.sort_values(["truth", "image_id"], ignore_index=True)


if __name__ == "__main__":
    run(main)
