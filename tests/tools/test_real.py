"""The driver of the study on real lungs, on phantoms: two runs share their data, and resume."""

import json
import os
import signal
import time
from dataclasses import replace
from threading import Thread

import pandas as pd
import pytest
from support import ROOT, load_script

from chest.core.labels import DISEASES
from chest.reporting.real_runs import RealRuns

real, real_plan = load_script("tools/real.py"), load_script("tools/real_plan.py")

PHANTOM = {"profile": "phantom", "collections": ["ct_volumes", "xrays"]}
PHANTOM |= {"phantom.expected_counts": None, "phantom.image_sizes": [32]}
SHORT = {"image_size": 32, "epochs": 1, "warmup_steps": 1, "weights": "random", "augment": None}
LINKS = {"data/manifest.csv": "data/all", "data/images": "data/all"}
HELD_OUT = {"split.external": ["Montgomery"], "split.folds": 3, "split.seed": 42}


def runs(checkpoint, **changes):
    """Return a plan of a trained system and the baselines on one split."""
    scripts = ("index_collections", "extract_slices", "build_manifest")
    stages = tuple((f"stages/{name}.py",) for name in scripts)
    yield real_plan.Run("data/all", stages, PHANTOM, {}, 1, raw=True)
    params = PHANTOM | HELD_OUT
    yield real_plan.Run("split/0", (("stages/split.py",),), params, LINKS, 1, thin=1)
    links = LINKS | {"data/split.csv": "split/0"}
    labels = real_plan.label("both", "baselines")
    yield real_plan.made("first", labels, (("stages/baselines.py",),), PHANTOM, links, 1)
    block = {"checkpoint": str(checkpoint), **SHORT, **changes}
    params = PHANTOM | {f"phantom.finetune_siglip.{key}": x for key, x in block.items()}
    labels = real_plan.label("both", "siglip")
    stages = (("stages/finetune_siglip.py",),)
    yield real_plan.made("second", labels, stages, params, links, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    load_script("data/make_checkpoints.py").make_siglip(folder, side=32, patch=8)
    return folder


@pytest.fixture(scope="module")
def study(phantoms, tiny, tmp_path_factory):
    """A study of which all runs are done."""
    study = real.Study(phantoms, tmp_path_factory.mktemp("into"), [*runs(tiny)])
    real.execute(study, study.runs, jobs=2)
    return study


def test_runs_share_their_data_and_keep_only_answers_and_records(study):
    folders = [study.into / run.name for run in study.runs if run.labels]
    packed = {(folder / "data/images").resolve() for folder in folders}
    assert packed == {(study.into / "data/all/data/images").resolve()}
    kept = {path.name for path in (folders[1] / "data").iterdir() if not path.is_symlink()}
    assert kept == {"predictions", "training"}
    assert not any((folder / name).exists() for folder in folders for name in real.BULK)
    done = json.loads((folders[1] / "done.json").read_text())
    assert (done["part"], done["system"], done["fold"]) == ("second", "siglip", 0)


def test_the_report_reads_what_was_stored(study):
    (study.into / "plan.json").write_text(json.dumps(study.planned()))
    found = RealRuns(study.into)
    [trained] = found.find(system="siglip")
    assert trained.record.weights == "random"
    assert {*trained.answers["split"]} == {"val", "test", "external"}
    assert {"blind_site", "linear_pixels"} <= {x.key for x in found.find(system="baselines")}


def test_thinned_tuberculosis_is_tested_instead_of_trained_on(study):
    folder = study.into / "split/0/data"
    table = pd.read_csv(folder / "manifest.csv").merge(pd.read_csv(folder / "split.csv"))
    counts = table[table["split"] == "train"]["label"].value_counts()
    assert counts[DISEASES["xray"]] == 1
    assert counts["normal"] == 3  # of both modalities
    held_back = table[(table["split"] == "external") & (table["site"] != "Montgomery")]
    assert {*held_back["label"]} == {"tuberculosis"}


def test_what_is_done_is_not_repeated_but_a_changed_parameter_is(study, phantoms, tiny):
    again = real.Study(phantoms, study.into, [*runs(tiny)])
    assert all(again.done(run) for run in again.runs)
    changed = real.Study(phantoms, study.into, [*runs(tiny, epochs=2)])
    assert [run.part for run in changed.runs if not changed.done(run)] == ["second"]
    assert [x["done"] for x in changed.planned()] == [changed.runs[2].name, None]
    # A parameter that no stage of the run reads changes nothing.
    data, split, baselines, _ = runs(tiny)
    params = baselines.params | {"phantom.finetune_siglip.lr": 0.1}
    other = [data, split, replace(baselines, params=params)]
    assert real.Study(phantoms, study.into, other).done(other[-1])


def test_a_failure_stops_what_needs_it_and_is_told(study, phantoms, tiny):
    data, split, baselines, _ = runs(tiny)
    wrong = split.params | {"split.external": ["Nowhere"]}
    split = replace(split, name="split/1", params=wrong)
    links = baselines.links | {"data/split.csv": "split/1"}
    plan = [data, split, replace(baselines, name="needy", links=links)]
    with pytest.raises(real.RealError, match=r"no image is from 'Nowhere'(.|\n)*needs split/1"):
        real.execute(real.Study(phantoms, study.into, plan), plan, jobs=1)


def test_an_interrupt_ends_the_stages_and_the_next_call_resumes(study, phantoms, tiny):
    long = real.Study(phantoms, study.into, [*runs(tiny, epochs=40, save_every=5)])
    folder = study.into / long.runs[-1].name

    def interrupt():
        while not any(path.is_file() for path in folder.glob(".resume/*/*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        real.execute(long, long.runs, jobs=1)
    assert not long.processes
    assert not long.done(long.runs[-1])
    again = real.Study(phantoms, study.into, long.runs)
    real.execute(again, again.runs, jobs=1)
    assert "Resuming after step" in (folder / "log.txt").read_text()
    assert again.done(again.runs[-1])


def test_the_plan_is_whole_and_within_three_hours():
    plan = real_plan.plan("net")
    seen = set()
    for run in real_plan.plan("net", full=True):
        assert {*run.links.values()} <= seen, f"{run.name} comes before what it needs"
        assert run.name not in seen
        seen.add(run.name)
        settings = real.settings(run)  # raises KeyError for a parameter that is not there
        for stage in run.stages:
            assert (ROOT / stage[0]).exists()
            real.picked(settings, stage)
    assert sum(run.cost for run in plan) <= 2 * 3 * 3600  # two at a time
    assert real.needed(plan, "ct")[0].name == "data/both"
