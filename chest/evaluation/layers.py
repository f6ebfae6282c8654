"""``data/layers/<system>.csv``: what a linear probe reads from each layer of a model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from chest.core.files import read_table
from chest.core.labels import LABELS, MODALITIES
from chest.evaluation.baselines import fit_linear
from chest.evaluation.intervals import intervals

FOLDER = Path("data/layers")
COLUMNS = ("layer", "modality", "n", "uar", "uar_low", "uar_high")


def score_layers(
    features: Mapping[str, np.ndarray], labelled: pd.DataFrame, seed: int, split: str = "test"
) -> Iterator[dict]:
    """Fit a probe on each layer's features, (N, d), and yield rows of COLUMNS.

    The regressions are those of the baselines: one per modality, C chosen on validation.
    """
    chosen = (labelled["split"] == split).to_numpy()
    for layer, values in features.items():
        fitted = fit_linear(values.astype(np.float64), labelled)
        predicted = np.array(LABELS)[fitted.probabilities.argmax(axis=1)]
        table = labelled[["patient_id", "modality"]].assign(
            actual=labelled["label"], predicted=predicted
        )[chosen]
        for modality in ("all", *MODALITIES):
            own = table if modality == "all" else table[table["modality"] == modality]
            if len(own):
                figures = intervals(own, seed).uar.as_dict("uar")
                yield {"layer": layer, "modality": modality, "n": len(own), **figures}


def read_layers() -> pd.DataFrame:
    """Return the scores of all systems, with the column ``system``; no rows if there are none."""
    paths = sorted(FOLDER.glob("*.csv"))
    tables = [read_table(path, COLUMNS).assign(system=path.stem) for path in paths]
    table = pd.concat([pd.DataFrame(columns=["system", *COLUMNS]), *tables], ignore_index=True)
    return table.astype({"n": int} | dict.fromkeys(("uar", "uar_low", "uar_high"), float))
