"""Learn from 1, 2, 4, … and all patients per class, on the features of a frozen encoder.

Reads   data/manifest.csv, data/split.csv, data/features/<encoder>.npy and .json
Writes  data/few_shots/<encoder>.csv: UAR on test within CT and within X-ray, by method and draw

    python stages/few_shots.py siglip        (or: dvc repro few_shots@siglip)
"""

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_labelled
from chest.data.features import read_features
from chest.evaluation.few_shots import learning_curves, write_curves


def main(encoder: str) -> None:
    params = load_params()
    labelled = read_labelled("train", "val", "test")
    features, _ = read_features(encoder, len(labelled))
    write_curves(encoder, learning_curves(features, labelled, params.seed))


if __name__ == "__main__":
    run_stage(main, argument="ENCODER")
