"""The parts of the model card; the whole card is tested with the stage `evaluate`."""

import pandas as pd
import yaml
from support import ROOT

from chest.evaluation.predictions import Record
from chest.reporting import model_card

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_percent_has_a_place_where_there_is_something():
    assert model_card.percent(0.1234) == "12.3 %"
    assert model_card.percent(0.8) == "80 %"


def test_the_split_says_how_and_what_is_held_out():
    assert "80 % / 10 % / 10 % by patient" in model_card._split(PARAMS["split"])
    folds = PARAMS["split"] | {"folds": 5, "fold": 0, "external": ["Montgomery"]}
    text = model_card._split(folds)
    assert text.startswith("Fold 1 of 5 by patient")
    assert text.endswith("sites held out: Montgomery")


def test_settings_list_a_block_of_the_parameters():
    text = model_card._settings(PARAMS["study"]["finetune_siglip"])
    assert "lr `2e-05`" in text
    assert "augment.rotate `10.0`" in text
    assert "checkpoint" not in text
    assert model_card._settings({}) == ""


def test_a_checkpoint_is_a_commit_or_a_folder():
    record = Record(name="A", kind="trained", n=1, checkpoint="some/where", revision="main")
    assert model_card._checkpoint(record).endswith("a local folder")
    fetched = record.model_copy(update={"commit": "abc"})
    assert model_card._checkpoint(fetched).endswith("commit `abc`")
    assert model_card._checkpoint(Record(name="A", kind="blind", n=1)) == "no checkpoint"


def test_tables_have_a_line_per_system_and_split():
    rows = [
        ["a", "test", "all", 0.5, 0.4, 0.6],
        ["a", "test", "ct", 0.25, 0.2, 0.3],
        ["b", "test", "all", 1.0, 0.9, 1.0],
        ["a", "external", "all", 0.1, 0.0, 0.2],
    ]
    table = pd.DataFrame(rows, columns=["system", "split", "within", "uar", "low", "high"])
    names = {"b": "System B", "a": "System A"}
    tables = model_card._by_split(table, "within", model_card.WITHIN, "uar", names)
    assert tables["test"].splitlines() == [
        "| UAR | all images | within CT |",
        "| --- | --- | --- |",
        "| System B | 100.0 % (90.0 to 100.0) | – |",
        "| System A | 50.0 % (40.0 to 60.0) | 25.0 % (20.0 to 30.0) |",
    ]
    assert len(tables["external"].splitlines()) == 3
