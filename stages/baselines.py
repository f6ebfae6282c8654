"""Answer without looking at the lungs: what every other system must beat.

Rules go by modality, by site, and by collection and site: balanced (blind_*), which maximises UAR,
and the commonest class (floor_*), which maximises WAR. blind_scanner is a logistic regression on
file size, grey levels and border, linear_pixels one on 28 x 28 pixels. All are trained on the
training split; the regularization is chosen on validation.

Reads   data/manifest.csv, data/split.csv, data/images/
Writes  data/predictions/{blind_modality,blind_site,blind_collection,floor_modality,floor_site,
        floor_collection,blind_scanner,linear_pixels}.csv and .json: val, test, external

    python stages/baselines.py        (or: dvc repro baselines)
"""

import numpy as np
import sklearn

from chest.core.runtime import run_stage
from chest.data.dataset import Dataset, read_dataset
from chest.data.regions import visible_region
from chest.evaluation.baselines import (
    RULES,
    Fitted,
    fit_linear,
    pool,
    rule_probabilities,
    scanner_features,
)
from chest.evaluation.predictions import Record, tabulate, write


def main() -> None:
    data = read_dataset("train", "val", "test")

    for system, rule in RULES.items():
        details = {"by": " and ".join(rule.by), "balanced": str(rule.balanced).lower()}
        answer(data, system, rule.name, rule_probabilities(data.table, rule), details)

    scanner = fit_linear(scanner_features(data.images, data.table), data.table)
    answer_fitted(data, "blind_scanner", "Blind: scanner traces", scanner)

    pixels = pool(data.images, visible_region("everything", data.images.shape[-1]))
    linear = fit_linear(pixels, data.table)
    answer_fitted(data, "linear_pixels", "Linear on 28 x 28 pixels", linear)


def answer_fitted(data: Dataset, system: str, name: str, fitted: Fitted) -> None:
    details = {f"C_{modality}": c for modality, c in fitted.strength.items()}
    versions = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
    answer(data, system, name, fitted.probabilities, details, versions)


def answer(
    data: Dataset,
    system: str,
    name: str,
    probabilities: np.ndarray,
    details: dict,
    versions: dict[str, str] | None = None,
) -> None:
    """Write the answers to all images but those of training; `probabilities` is (N, 3)."""
    rows = data.rows("val", "test", "external")
    table = tabulate(data.table.iloc[rows], probabilities[rows])
    record = Record(name=name, kind="blind", n=len(rows), details=details, versions=versions or {})
    write(system, table, record)


if __name__ == "__main__":
    run_stage(main)
