"""Fit a logistic regression per modality on the features of a frozen encoder: a linear probe.

The strongest cheap baseline of a pretrained encoder. C is chosen on the validation split.

Reads   data/manifest.csv, data/split.csv, data/features/<encoder>.npy and .json
Writes  data/predictions/probe_<encoder>.csv and .json: val, test, external

    python stages/probe_features.py siglip        (or: dvc repro probe_features@siglip)
"""

from chest.core.runtime import run_stage
from chest.data.dataset import read_labelled
from chest.data.features import read_features
from chest.evaluation.baselines import fit_linear
from chest.evaluation.predictions import Record, tabulate, write


def main(encoder: str) -> None:
    labelled = read_labelled("train", "val", "test")
    features, made = read_features(encoder, len(labelled))
    fitted = fit_linear(features, labelled)

    rows = labelled[labelled["split"] != "train"]
    table = tabulate(rows, fitted.probabilities[rows.index])
    described = {"name": f"Frozen {encoder}, logistic regression", **fitted.describe(made)}
    write(f"probe_{encoder}", table, Record(kind="trained", n=len(rows), **described))


if __name__ == "__main__":
    run_stage(main, argument="ENCODER")
