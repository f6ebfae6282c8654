"""The parts of the model card; the whole card is tested with the stage `evaluate`."""

import pandas as pd
import pytest
import yaml
from answers import a_system
from support import ROOT

from chest.evaluation.predictions import Record, System
from chest.reporting import model_card
from chest.reporting.wording import WITHIN

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_the_split_says_how_and_what_is_held_out():
    assert "80 % / 10 % / 10 % by patient" in model_card.split_text(PARAMS["split"])
    folds = PARAMS["split"] | {"folds": 5, "fold": 0, "external": ["Montgomery"]}
    text = model_card.split_text(folds)
    assert text.startswith("Fold 1 of 5 by patient")
    assert text.endswith("sites held out: Montgomery")


def test_settings_list_a_block_of_the_parameters():
    text = model_card.settings(PARAMS["study"]["finetune_siglip"])
    assert "lr `2e-05`" in text
    assert "augment.rotate `10.0`" in text
    assert "checkpoint" not in text
    assert model_card.settings({}) == ""


def test_a_checkpoint_is_a_commit_or_a_folder():
    record = Record(name="A", kind="trained", n=1, checkpoint="some/where", revision="main")
    assert model_card.checkpoint(record.model_dump()).endswith("a local folder")
    fetched = record.model_copy(update={"commit": "abc"})
    assert model_card.checkpoint(fetched.model_dump()).endswith("commit `abc`")
    blind = Record(name="A", kind="blind", n=1)
    assert model_card.checkpoint(blind.model_dump()) == "no checkpoint"


@pytest.mark.parametrize(
    ("profile", "device", "shown", "torch"),
    [
        ("phantom", "CPU (EPYC 7B13)", "CPU", "2.13.0"),
        ("phantom", "NVIDIA H100", "NVIDIA H100", "2.13.0"),
        ("phantom", None, None, "2.13.0"),
        ("study", "CPU (EPYC 7B13)", "CPU (EPYC 7B13)", "2.13.0+cu130"),
    ],
)
def test_phantom_runs_name_no_processor_and_no_build(profile, device, shown, torch):
    versions = {"python": "3.11", "torch": "2.13.0+cu130"}
    record = Record(name="A", kind="trained", n=1, device=device, versions=versions)
    tracked = model_card.tracked_record(System("a", record, a_system("a").answers), profile)
    assert (tracked["device"], tracked["versions"]["torch"]) == (shown, torch)
    assert ("python" in tracked["versions"]) == (profile == "study")


def test_tables_have_a_line_per_system_and_split():
    rows = [
        ["a", "test", "all", 0.5, 0.4, 0.6],
        ["a", "test", "ct", 0.25, 0.2, 0.3],
        ["b", "test", "all", 1.0, 0.9, 1.0],
        ["a", "external", "all", 0.1, 0.0, 0.2],
    ]
    table = pd.DataFrame(rows, columns=["system", "split", "within", "uar", "low", "high"])
    names = {"b": "System B", "a": "System A"}
    tables = model_card.interval_tables(table, "UAR", WITHIN, names)
    assert tables["test"].splitlines() == [
        "| UAR | all images | within CT |",
        "| --- | --- | --- |",
        "| System B | 100.0 % (90.0 to 100.0) | – |",
        "| System A | 50.0 % (40.0 to 60.0) | 25.0 % (20.0 to 30.0) |",
    ]
    assert len(tables["external"].splitlines()) == 3
