"""Within modality and within site: the right images, the right figures, and words for one class."""

import json

import pandas as pd
import pytest

from chest.intervals import intervals
from chest.within import (
    COLUMNS,
    nest_within,
    score_modalities,
    score_sites,
    slug,
    tabulate_within,
)

ROWS = [
    # site, modality, actual, predicted
    ("Sari", "ct", "covid19", "covid19"), ("Sari", "ct", "covid19", "normal"),
    ("Sari", "ct", "normal", "normal"), ("Sari", "ct", "normal", "tuberculosis"),
    ("Rome, St. M", "ct", "covid19", "covid19"), ("Rome, St. M", "ct", "covid19", "covid19"),
    ("Sari", "xray", "tuberculosis", "normal"), ("Sari", "xray", "normal", "normal"),
]  # fmt: skip


@pytest.fixture
def table():
    table = pd.DataFrame(ROWS, columns=["site", "modality", "actual", "predicted"])
    return table.assign(patient_id=[f"p{i}" for i in range(len(ROWS))])


def score_within(table):
    return score_modalities(table, 0) + score_sites(table, 0)


def test_groups_are_modalities_and_the_sites_of_each(table):
    groups = score_within(table)
    assert [(g.kind, g.key, g.name, len(g.rows)) for g in groups] == [
        ("modality", "ct", "CT", 6), ("modality", "xray", "X-ray", 2),
        ("site", "site_rome_st_m_ct", "Rome, St. M (CT)", 2),
        ("site", "site_sari_ct", "Sari (CT)", 4),
        ("site", "site_sari_x_ray", "Sari (X-ray)", 2),
    ]  # fmt: skip


def test_figures_are_those_of_the_groups_images_alone(table):
    metrics = nest_within(score_within(table))
    assert metrics["ct"]["recall"] == {"covid19": 0.75, "normal": 0.5}
    assert metrics["ct"]["uar"] == 0.625
    assert metrics["ct"]["images"] == 6
    # A CT slice that is called tuberculosis is wrong.
    assert metrics["site_sari_ct"]["recall"] == {"covid19": 0.5, "normal": 0.5}
    assert metrics["xray"]["recall"] == {"normal": 1, "tuberculosis": 0}
    expected = intervals(table[table["modality"] == "ct"], 0).uar
    assert (metrics["ct"]["uar_low"], metrics["ct"]["uar_high"]) == (expected.low, expected.high)
    json.dumps(metrics, allow_nan=False)


def test_a_group_of_one_class_says_so(table):
    groups = score_within(table)
    assert "site_rome_st_m_ct" not in nest_within(groups)
    rows = tabulate_within("x", groups)
    assert list(rows.columns) == list(COLUMNS)
    lone = rows[rows["group"] == "Rome, St. M (CT)"].iloc[0]
    assert lone["note"] == "one class only (covid19): nothing to tell apart"
    assert (lone["images"], lone["covid19_images"], lone["normal_images"]) == (2, 2, 0)
    assert lone["uar"] == lone["covid19_recall"] == ""
    others = rows[rows["group"] != "Rome, St. M (CT)"]
    assert (others["note"] == "").all()
    assert (others["uar"] != "").all()


def test_no_empty_cell_is_written_as_nan(table, tmp_path):
    rows = tabulate_within("x", score_within(table))
    rows.to_csv(tmp_path / "within.csv", index=False)
    assert "nan" not in (tmp_path / "within.csv").read_text().lower()


def test_a_modality_without_images_is_left_out(table):
    groups = score_modalities(table[table["modality"] == "ct"], 0)
    assert [g.key for g in groups] == ["ct"]


def test_modalities_are_scored_without_sites(table):
    assert [g.key for g in score_modalities(table.drop(columns="site"), 0)] == ["ct", "xray"]


def test_names_become_keys():
    assert slug("Babak Imaging Center, Tehran (CT)") == "babak_imaging_center_tehran_ct"
    assert slug("Málaga $5_100%.b") == "málaga_5_100_b"
