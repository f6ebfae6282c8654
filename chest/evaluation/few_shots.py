"""Few shots: how much a classifier on frozen features gains from more patients.

A curve that still rises at the last patients says that a class fails for want of images; a flat one
says that more of the same images would not help. Patients are drawn per class within a modality,
with all of their images. Two methods learn from them: the nearest class mean (prototypes; Snell et
al. 2017, arXiv:1703.05175) and logistic regression, whose C is chosen on the validation split:
generous to the smallest numbers. Features are standardised by all training images of the modality,
which needs no labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler

from chest.core.errors import InputError, Problem
from chest.core.files import REMEDY, read_table, write_table
from chest.core.labels import DISEASES
from chest.core.parallel import progress
from chest.evaluation.baselines import fit_logistic
from chest.evaluation.metrics import classification_metrics

FOLDER = Path("data/few_shots")
COLUMNS = ("method", "modality", "patients", "draw", "uar")
METHODS = {"prototypes": "nearest class mean", "logistic": "logistic regression"}
PATIENTS = (1, 2, 4, 8, 16, 32, 64)  # per class; then all
ALL = "all"
DRAWS = 10


@dataclass(frozen=True)
class Part:
    """Images of one split and modality: features (n, K), labels (n,) and patients (n,)."""

    features: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def learning_curves(features: np.ndarray, labelled: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the UAR on test by method, modality, patients per class and draw (COLUMNS).

    `features` is float64, (N, K), one row per row of `labelled`. ``patients`` is one of PATIENTS
    that each class has, in DRAWS draws, or ``all``, in one. A modality without both of its classes
    in training and test is left out.
    """
    rows = []
    for modality in DISEASES:
        train, val, test = _parts(features, labelled, modality)
        if len({*train.labels}) < 2 or len({*test.labels}) < 2:
            continue
        for patients, draw, chosen in progress([*_draws(train, seed)], "draws"):
            shots = Part(train.features[chosen], train.labels[chosen], train.patients[chosen])
            for method, said in _answers(shots, val, test).items():
                uar = round(classification_metrics(test.labels, said)["uar"], 4)
                rows.append((method, modality, str(patients), draw, uar))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _parts(features: np.ndarray, labelled: pd.DataFrame, modality: str) -> list[Part]:
    """Return the training, validation and test images of `modality`, features standardised."""
    own = (labelled["modality"] == modality).to_numpy()
    rows = [np.flatnonzero(own & (labelled["split"] == x)) for x in ("train", "val", "test")]
    if not len(rows[0]):
        return [Part(*[np.empty(0)] * 3)] * 3
    scaler = StandardScaler().fit(features[rows[0]])
    labels, patients = labelled["label"].to_numpy(), labelled["patient_id"].to_numpy()
    return [
        Part(scaler.transform(features[x]) if len(x) else features[x], labels[x], patients[x])
        for x in rows
    ]


def _draws(train: Part, seed: int) -> Iterator[tuple[int | str, int, np.ndarray]]:
    """Yield patients per class, draw, and the training images drawn, int64 (n,).

    A draw's patients are the first of one order: larger numbers add to smaller ones.
    """
    classes = np.unique(train.labels)
    members = [np.unique(train.patients[train.labels == x]) for x in classes]
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw])
        orders = [rng.permutation(own) for own in members]
        for count in PATIENTS:
            if count <= min(map(len, members)):
                chosen = [
                    (train.labels == x) & np.isin(train.patients, order[:count])
                    for x, order in zip(classes, orders, strict=True)
                ]
                yield count, draw, np.flatnonzero(np.any(chosen, axis=0))
    yield ALL, 0, np.arange(len(train.labels))


def _answers(shots: Part, val: Part, test: Part) -> dict[str, np.ndarray]:
    """Return the answer of each of METHODS to the test images, (n,)."""
    logistic = fit_logistic(shots.features, shots.labels, val.features, val.labels)
    return {
        "prototypes": _nearest_mean(shots, test.features),
        "logistic": logistic.predict(test.features),
    }


def _nearest_mean(shots: Part, features: np.ndarray) -> np.ndarray:
    """Return the class whose mean feature vector is nearest, (n,)."""
    classes = np.unique(shots.labels)
    means = [shots.features[shots.labels == x].mean(axis=0) for x in classes]
    return classes[cdist(features, means).argmin(axis=1)]


# --- Files and summary -----------------------------------------------------------------------


def write_curves(encoder: str, table: pd.DataFrame) -> None:
    """Write ``data/few_shots/<encoder>.csv``."""
    write_table(FOLDER / f"{encoder}.csv", table, float_format="%.4f")


def read_curves(labelled: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of all encoders, averaged over the draws; no rows if there are none.

    Columns: encoder, method, modality, patients (as written), per_class (their number; of ``all``
    the training patients of the smaller class), draws, uar (mean), sd (of the draws; 0 of one).
    """
    columns = ["encoder", *COLUMNS]
    tables = [_read(path).assign(encoder=path.stem) for path in sorted(FOLDER.glob("*.csv"))]
    table = pd.concat([pd.DataFrame(columns=columns), *tables], ignore_index=True)
    smaller = _smaller_classes(labelled)
    table["per_class"] = [
        smaller[modality] if patients == ALL else int(patients)
        for modality, patients in zip(table["modality"], table["patients"], strict=True)
    ]
    keys = ["encoder", "method", "modality", "patients", "per_class"]
    drawn = table.astype({"uar": float}).groupby(keys, sort=False)["uar"]
    found = drawn.agg(draws="size", uar="mean", sd="std").fillna(0).round(4)
    return found.reset_index()


def _read(path: Path) -> pd.DataFrame:
    table = read_table(path, COLUMNS)
    known = {*map(str, PATIENTS), ALL}
    uar = pd.to_numeric(table["uar"], errors="coerce")
    good = table["method"].isin(METHODS) & table["modality"].isin(DISEASES)
    if not (good & table["patients"].isin(known) & uar.between(0, 1)).all():
        found, expected = "rows that are no results", f"the columns {','.join(COLUMNS)} as written"
        raise InputError([Problem(path, found, expected, REMEDY)])
    return table.assign(uar=uar)


def _smaller_classes(labelled: pd.DataFrame) -> dict[str, int]:
    """Return {modality: number of training patients of its smaller class}."""
    train = labelled[labelled["split"] == "train"]
    counts = train.groupby(["modality", "label"])["patient_id"].nunique()
    return counts.groupby("modality").min().to_dict()


def nest_curves(curves: pd.DataFrame) -> dict:
    """Return {encoder: {method: {modality: {patients: {uar, sd, draws}}}}} of `read_curves`."""
    nested: dict = {}
    for row in curves.to_dict("records"):
        place = nested
        for key in ("encoder", "method", "modality", "patients"):
            place = place.setdefault(row[key], {})
        place |= {key: row[key] for key in ("uar", "sd", "draws")}
    return nested
