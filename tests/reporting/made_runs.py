"""Made-up runs of tools/real.py: 60 films of two hospitals and 40 CT slices, in three folds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.labels import DISEASES, LABELS
from chest.data.dataset import MANIFEST_COLUMNS
from chest.evaluation.predictions import CURVE_COLUMNS, Record, tabulate, write

FOLDS = 3
SITES = {"ct": ["Moscow"] * 60, "xray": ["Shenzhen"] * 60 + ["Montgomery"] * 36}
BOTH = ["ct", "xray"]
EXTERNAL = {
    "both": "",
    "ct": "",
    "films": "",
    "shenzhen": "Montgomery",
    "ct_shenzhen": "Montgomery",
    "montgomery": "Shenzhen",
}
KEYS = {"finetuned": "finetune_efficientnet_b0", "frozen": "probe_efficientnet_b0"}


def manifest(protocol: str) -> pd.DataFrame:
    """Return images that are diseased and normal in turn, one per patient."""
    modalities = {"both": BOTH, "ct_shenzhen": BOTH, "ct": ["ct"]}.get(protocol, ["xray"])
    rows = [
        {
            "image_id": f"{modality}_{number:03}",
            "label": DISEASES[modality] if number % 2 else "normal",
            "modality": modality,
            "site": site,
            "patient_id": f"{modality}_{number}",
        }
        for modality in modalities
        for number, site in enumerate(SITES[modality])
    ]
    table = pd.DataFrame(rows)
    return table.reindex(columns=list(MANIFEST_COLUMNS), fill_value="x")


def write_run(into: Path, labels: dict, wrong: float, across: float = 0.0, **details) -> dict:
    """Write a run that answers each class wrongly in a share of the images; return its plan.

    `wrong` is the share in validation and test, `across` that in the hospital held out; the wrong
    ones are the first images of each class and site. `details` are further ones of its record.
    """
    labels = {"part": "made", "view": "everything", "variant": "", "seed": 0} | labels
    place = into.joinpath("runs", *(str(value) for value in labels.values() if value != ""))
    table = manifest(labels["protocol"])
    pair = table.groupby(["modality", "site", "label"]).cumcount()
    fold = (pair + labels["fold"]) % FOLDS
    split = np.array(["test", "val", *["train"] * (FOLDS - 2)], dtype=object)[fold]
    split[table["site"] == EXTERNAL[labels["protocol"]]] = "external"
    table["split"] = split
    rows = table[table["split"] != "train"].reset_index(drop=True)
    count = rows.groupby(["split", "modality", "site", "label"])["label"]
    share = np.where(rows["split"] == "external", across, wrong)
    mistaken = count.cumcount() < (share * count.transform("size")).round()
    other = np.where(rows["label"] == "normal", rows["modality"].map(DISEASES), "normal")
    said = np.where(mistaken, other, rows["label"])
    shares = [[0.8 if label == answer else 0.1 for label in LABELS] for answer in said]

    (place / "data/training").mkdir(parents=True)
    table[list(MANIFEST_COLUMNS)].to_csv(place / "data/manifest.csv", index=False)
    table[["image_id", "split"]].to_csv(place / "data/split.csv", index=False)
    key = KEYS.get(labels["system"], labels["system"])
    details |= {"best_epoch": 1, "trained_on": int((table["split"] == "train").sum())}
    described = {"weights": "pretrained", "checkpoint": "somewhere/net", "device": "CPU (made)"}
    record = Record(name="Net", kind="trained", n=len(rows), details=details, **described)
    write(key, tabulate(rows, shares), record, place / "data/predictions")
    curve = pd.DataFrame([[1] + [1 - wrong] * (len(CURVE_COLUMNS) - 1)], columns=CURVE_COLUMNS)
    curve.to_csv(place / f"data/training/{key}.csv", index=False)
    done = {"digest": "", "seconds": 36.0, "commit": "abc", **labels}
    (place / "done.json").write_text(json.dumps(done))
    return labels | {"done": str(place.relative_to(into))}


def write_plan(into: Path, planned: list[dict]) -> None:
    (into / "plan.json").write_text(json.dumps(planned))
