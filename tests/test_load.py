"""The stages that need no model grow with the images, not with their pairs."""

import math
from contextlib import chdir

import numpy as np
import pandas as pd
import pytest
from support import load_script

from chest.dataset import IMAGES, MANIFEST
from chest.labels import LABELS

FEW, MANY = 4_000, 32_000
FACTOR = MANY / FEW
# Processor time in ms that one more image may take: five to ten times what it takes.
LIMITS = {"extract_slices": 0.5, "build_manifest": 3, "split": 0.1, "audit": 1.2, "floors": 0.2,
          "evaluate": 0.8}  # fmt: skip

load = load_script("benchmarks/load.py")


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """{stage: (what it took for few images, for many)}, by processor time: others may be busy."""
    found = []
    for n in (FEW, MANY):
        with chdir(tmp_path_factory.mktemp("load")):
            found.append({run["stage"]: run for run in load.measure(n)})
    return {stage: (found[0][stage], found[1][stage]) for stage in load.STAGES}


@pytest.mark.parametrize("stage", load.STAGES)
def test_time_grows_less_than_with_the_pairs(grown, stage):
    few, many = (run["cpu_seconds"] for run in grown[stage])
    # Linear is 1, quadratic 2; what a stage does once, however many images, makes it less.
    assert math.log(many / few, FACTOR) < 1.5
    assert 1000 * (many - few) / (MANY - FEW) < LIMITS[stage]


@pytest.mark.parametrize("stage", load.STAGES)
def test_memory_grows_by_little(grown, stage):
    few, many = (run["mib"] for run in grown[stage])
    assert many < 1024
    # A byte for each pair of images would be 1,000 MiB.
    assert many - few < 200


def test_the_made_study_has_the_studys_structure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load.make_collections(load.STUDY)
    for stage in ("extract_slices", "build_manifest"):
        load.run_stage(stage)
    table = pd.read_csv(MANIFEST)
    assert table["label"].value_counts()[list(LABELS)].tolist() == [8449, 7506, 345]
    assert table["patient_id"].nunique() == 464 + 604 + 1110 - 304 + 704
    both = table.groupby("patient_id")["collection"].nunique()
    assert (both > 1).sum() == 304
    assert np.load(IMAGES).shape == (16_300, load.SIDE, load.SIDE)


def test_a_stage_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(load.LoadError, match=r"split ended with exit code 1:\nERROR: params.yaml"):
        load.run_stage("split")


def test_exponents_are_slopes_in_logarithms():
    runs = [
        {"stage": "a", "images": n, "seconds": 3e-6 * n**2, "mib": 5 * n} for n in (100, 200, 400)
    ]
    assert load.exponents(runs) == {"a": {"seconds": 2.0, "mib": 1.0}}
    assert load.exponents(runs[:1]) == {}
