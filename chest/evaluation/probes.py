"""Shortcut probes: what a simple model learns from a part of the image alone.

A linear model is trained and tested on images of which only a region is visible. If it beats the
blind rules with the lungs hidden, something outside the lungs tells the class, and a network may
use it. (A network that was trained on whole images says little when it is shown a part: what it
answers to blackened lungs is arbitrary.) After Maguolo and Nanni, "A critic evaluation of methods
for COVID-19 automatic detection from X-ray images" (2020, arXiv:2004.12823).

The pooled probes learn from all sites. Those across sites learn from one hospital and are tested on
its own test images and on all images of each other hospital, at a threshold that was not moved.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table, write_table
from chest.core.labels import DISEASES, MODALITY_NAMES
from chest.core.parallel import parallel_map
from chest.data.regions import VISIBLE, VISIBLE_NAMES
from chest.evaluation.baselines import fit_logistic
from chest.evaluation.intervals import intervals
from chest.evaluation.predictions import PLACES, System, read_system
from chest.evaluation.roc import auroc

FOLDER = Path("data/probes")  # in the format of data/predictions, but no systems
ACROSS = "across"  # the folder in it for models of one site
KEYS = ("region", "modality", "trained_on", "tested_on")
ACROSS_COLUMNS = ("trained_on", "image_id", "disease")
FEWEST_TRAINED, FEWEST_TESTED = 5, 2  # patients of each class in a site
THRESHOLD = 0.5  # of the balanced model's probability


def read_probes(labelled: pd.DataFrame) -> dict[str, System]:
    """Read the answers of all probes; see `predictions.read_system`."""
    return {name: read_system(name, labelled, FOLDER) for name in VISIBLE}


def probe_name(region: str) -> str:
    """Return the display name of the probe of a region."""
    return f"Linear probe: {VISIBLE_NAMES[region].lower()}"


# --- Across sites ----------------------------------------------------------------------------


def fit_across(features: np.ndarray, labelled: pd.DataFrame) -> pd.DataFrame:
    """Fit a logistic regression per site and answer its test images and all other sites' images.

    `features` is float64, (N, K), one row per row of `labelled`. A model sees the training images
    of its site; C is chosen on the site's validation images. Sites with fewer than FEWEST_TRAINED
    patients of a class are left out. Returns ACROSS_COLUMNS: ``disease`` is the probability of
    the modality's disease, against normal.
    """
    tables = [pd.DataFrame(columns=list(ACROSS_COLUMNS))]
    for site, rows, tested in _sites(labelled):
        own = labelled.iloc[rows]
        train, val = (rows[(own["split"] == split).to_numpy()] for split in ("train", "val"))
        scaler = StandardScaler().fit(features[train])
        labels = labelled["label"].to_numpy()
        val_features = scaler.transform(features[val]) if len(val) else features[val]
        model = fit_logistic(
            scaler.transform(features[train]), labels[train], val_features, labels[val]
        )
        disease = int(np.flatnonzero(model.classes_ != "normal")[0])
        score = model.predict_proba(scaler.transform(features[tested]))[:, disease].round(PLACES)
        ids = labelled["image_id"].to_numpy()[tested]
        tables.append(pd.DataFrame({"trained_on": site, "image_id": ids, "disease": score}))
    return pd.concat(tables, ignore_index=True)


def _sites(labelled: pd.DataFrame) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each site to train on: its name, its rows and the rows to test on, int64 (n,)."""
    names, splits = site_names(labelled), labelled["split"].to_numpy()
    for modality, disease in DISEASES.items():
        known = (labelled["modality"] == modality) & labelled["label"].isin(["normal", disease])
        train = labelled[known & (splits == "train")]
        for site in sorted(set(names[train.index])):
            if _enough(train[names[train.index] == site], FEWEST_TRAINED):
                at = (names == site).to_numpy()
                yield (
                    site,
                    np.flatnonzero(known & at),
                    np.flatnonzero(known & (~at | (splits == "test"))),
                )


def site_names(labelled: pd.DataFrame) -> pd.Series:
    """Return the site of each image, with the modality where a site has several."""
    several = labelled.groupby("site")["modality"].transform("nunique") > 1
    named = labelled["site"] + " (" + labelled["modality"].map(MODALITY_NAMES) + ")"
    return labelled["site"].mask(several, named)


def _enough(rows: pd.DataFrame, fewest: int) -> bool:
    """Return whether there are two classes, and at least `fewest` patients of each."""
    patients = rows.groupby("label")["patient_id"].nunique()
    return len(patients) > 1 and patients.min() >= fewest


def write_across(region: str, table: pd.DataFrame, folder: Path) -> None:
    """Write a table made by `fit_across` to ``<folder>/across/<region>.csv``."""
    write_table(folder / ACROSS / f"{region}.csv", table, float_format=f"%.{PLACES}f")


def read_across(labelled: pd.DataFrame) -> pd.DataFrame:
    """Read the answers of all regions: ACROSS_COLUMNS, region and the manifest's columns."""
    tables = []
    for region in VISIBLE:
        path = FOLDER / ACROSS / f"{region}.csv"
        table = read_table(path, ACROSS_COLUMNS)
        table["disease"] = pd.to_numeric(table["disease"], errors="coerce")
        known = table["image_id"].isin(labelled["image_id"])
        if not (known & table["disease"].between(0, 1)).all():
            expected = "images of data/manifest.csv and probabilities"
            raise InputError([Problem(path, "rows that are no answers", expected, REMEDY)])
        tables.append(table.assign(region=region))
    described = labelled.assign(tested_on=site_names(labelled))
    columns = ["image_id", "label", "split", "modality", "patient_id", "tested_on"]
    return pd.concat(tables).merge(described[columns], on="image_id")


def score_across(answers: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one row per region, training site and site tested on, of what `read_across` read.

    Columns: region, modality, trained_on, tested_on, auroc, auroc_low, auroc_high, uar, uar_low,
    uar_high (4 places), n (images), patients. Sites with fewer than FEWEST_TESTED patients of a
    class are left out.
    """
    parts = [(place, rows) for place, rows in answers.groupby(list(KEYS), sort=False)]
    parts = [part for part in parts if _enough(part[1], FEWEST_TESTED)]
    found = parallel_map(partial(_score, seed=seed), parts)
    figures = [f"{name}{end}" for name in ("auroc", "uar") for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=[*KEYS, *figures, "n", "patients"])


def _score(part: tuple[tuple[str, ...], pd.DataFrame], seed: int) -> dict[str, str | float]:
    place, rows = part
    disease = DISEASES[rows["modality"].iloc[0]]
    truth, score = (rows["label"] == disease).to_numpy(), rows["disease"].to_numpy()
    said = np.where(score >= THRESHOLD, disease, "normal")
    table = rows[["patient_id"]].assign(actual=rows["label"], predicted=said)
    figures = auroc(rows["patient_id"], truth, score, seed).as_dict("auroc")
    figures |= intervals(table, seed).uar.as_dict("uar")
    counts = {"n": len(rows), "patients": rows["patient_id"].nunique()}
    figures = {key: round(value, 4) for key, value in figures.items()}
    return dict(zip(KEYS, place, strict=True)) | figures | counts


def nest_across(table: pd.DataFrame) -> dict:
    """Return {region: {"across": {trained_on: {tested_on: figures}}}} of `score_across`."""
    nested: dict = {}
    for row in table.to_dict("records"):
        across = nested.setdefault(row["region"], {}).setdefault("across", {})
        keys = [key for key in row if key.startswith(("auroc", "uar")) or key in ("n", "patients")]
        across.setdefault(row["trained_on"], {})[row["tested_on"]] = {key: row[key] for key in keys}
    return nested
