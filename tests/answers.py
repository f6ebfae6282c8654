"""Answers of made-up systems, in the form in which `evaluate` tracks them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.labels import LABELS
from chest.evaluation.predictions import Record, System, tabulate
from chest.evaluation.revisions import write_answers

SITE = "St. <b>Mary</b> | @all"
CURVE = """epoch,train_loss,val_loss,learning_rate,val_uar,val_war,val_within,val_worst
1,1.0,1.1,0.1,0.5,0.5,0.5,0.5
2,0.7,0.9,0.05,{0},0.6,{0},0.4
"""


def a_system(key, wrong=0, patients=120, sites=(SITE,)):
    """Return a system that answers the first `wrong` images of each class wrongly.

    Each patient has one image: COVID-19 CT, normal CT, normal X-ray, tuberculosis X-ray in turn;
    `sites` take turns every four images.
    """
    number = np.arange(4 * patients)
    group = number % 4
    actual = np.array(["covid19", "normal", "normal", "tuberculosis"])[group]
    other = np.array(["normal", "covid19", "tuberculosis", "normal"])[group]
    predicted = np.where(number // 4 < wrong, other, actual)
    rows = pd.DataFrame(
        {
            "image_id": [f"image_{n:04}" for n in number],
            "split": "test",
            "label": actual,
            "patient_id": [f"patient_{n}" for n in number],
            "modality": np.where(group < 2, "ct", "xray"),
            "collection": np.where(group < 2, "ct_volumes", "xrays"),
            "site": np.array(sites)[number // 4 % len(sites)],
            "study": "",
        }
    )
    shares = [[0.8 if label == answer else 0.1 for label in LABELS] for answer in predicted]
    known = ["image_id", "patient_id", "modality", "collection", "site", "study"]
    answers = tabulate(rows, shares).merge(rows[known], on="image_id")
    return System(key, Record(name=key.title(), kind="trained", n=len(rows)), answers)


def write_run(folder, *systems, val=0.6, **figures):
    """Write what `evaluate` tracks of these systems to metrics/ and plots/."""
    folder = Path(folder)
    for name in ("metrics", "plots"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "plots/training").mkdir(parents=True)
    write_answers(folder / "metrics/answers.csv", {system.key: system for system in systems})
    test = {system.key: {"uar": 0.9, "uar_low": 0.8, **figures} for system in systems}
    runs = {system.key: {"name": system.name, "details": {"best_epoch": 2}} for system in systems}
    audit = {"audit": {"shared": {"patients": 0, "pixels": 2}}}
    for name, content in {"test": test, "runs": runs, "audit": audit}.items():
        (folder / "metrics" / f"{name}.json").write_text(json.dumps(content))
    for system in systems:
        (folder / "plots/training" / f"{system.key}.csv").write_text(CURVE.format(val))
