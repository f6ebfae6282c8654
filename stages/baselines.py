"""Answer by simple means: baselines that are blind to the lungs, and a linear model that is not.

Rules go by modality, by site, and by collection and site: balanced (blind_*), which maximises UAR,
and the commonest class (floor_*), which maximises WAR. blind_scanner is a logistic regression on
file size and the border of the image. linear_pixels is one on the whole
image at 28 x 28 pixels, so it is not blind. All are trained on the training split; the
regularization is chosen on validation.

Reads   data/manifest.csv, data/split.csv, data/images/
Writes  data/predictions/{blind_modality,blind_site,blind_collection,floor_modality,floor_site,
        floor_collection,blind_scanner,linear_pixels}.csv and .json: val, test, external

    python stages/baselines.py        (or: dvc repro baselines)
"""

import numpy as np

from chest.core.runtime import run_stage
from chest.data.dataset import Dataset, read_dataset
from chest.data.regions import visible_region
from chest.evaluation.baselines import (
    RULES,
    fit_linear,
    pool,
    rule_probabilities,
    scanner_features,
)
from chest.evaluation.predictions import Record, tabulate, write


def main() -> None:
    data = read_dataset("train", "val", "test")

    for system, rule in RULES.items():
        probabilities = rule_probabilities(data.table, rule)
        details = {"by": " and ".join(rule.by), "balanced": str(rule.balanced).lower()}
        answer(data, system, probabilities, name=rule.name, kind="blind", details=details)

    fitted = fit_linear(scanner_features(data.images, data.table), data.table)
    described = {"name": "Blind: scanner traces", "kind": "blind", **fitted.describe()}
    answer(data, "blind_scanner", fitted.probabilities, **described)

    pixels = pool(data.images, visible_region("everything", data.images.shape[-1]))
    fitted = fit_linear(pixels, data.table)
    described = {"name": "Linear on 28 x 28 pixels", "kind": "trained", **fitted.describe()}
    answer(data, "linear_pixels", fitted.probabilities, **described)


def answer(data: Dataset, system: str, probabilities: np.ndarray, **described) -> None:
    """Write the answers to all images but those of training, and the record `described`.

    `probabilities` is float64, (N, 3), one row per image.
    """
    rows = data.rows("val", "test", "external")
    table = tabulate(data.table.iloc[rows], probabilities[rows])
    write(system, table, Record(n=len(rows), **described))


if __name__ == "__main__":
    run_stage(main)
