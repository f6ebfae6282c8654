"""Fit a logistic regression per modality on the findings that a model named, and nothing else.

Reads   data/manifest.csv, data/split.csv, data/annotations.csv and .json
Writes  data/predictions/probe_findings.csv and .json: val, test, external

    python stages/probe_findings.py        (or: dvc repro probe_findings)
"""

from chest.core.params import load_params
from chest.core.runtime import run_stage
from chest.data.annotations import read_annotations
from chest.data.dataset import read_labelled
from chest.evaluation.baselines import fit_linear
from chest.evaluation.predictions import Record, tabulate, write
from chest.models.settings import AnnotationPrompts

SYSTEM = "probe_findings"


def main() -> None:
    prompts = load_params().section("prompts.annotations", AnnotationPrompts)
    labelled = read_labelled("train", "val", "test")
    findings, _, made = read_annotations(labelled, [*prompts.findings])
    fitted = fit_linear(findings, labelled)

    rows = labelled[labelled["split"] != "train"]
    described = {"name": "Named findings, logistic regression", **fitted.describe(made)}
    record = Record(kind="trained", n=len(rows), **described)
    write(SYSTEM, tabulate(rows, fitted.probabilities[rows.index]), record)


if __name__ == "__main__":
    run_stage(main)
