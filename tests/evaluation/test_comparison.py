"""Paired comparison: no difference where there is none, runs count, two primary questions."""

import numpy as np
import pandas as pd
import pytest
from made import constant_system, make_manifest, make_system

from chest.core.errors import InputError
from chest.evaluation.comparison import (
    ONE_RUN,
    compare,
    holm,
    p_value,
    pooled,
    primary_comparisons,
)
from chest.evaluation.intervals import Bootstrap, intervals
from chest.evaluation.metrics import classification_metrics

LABELLED = make_manifest(30)
GOOD = make_system(LABELLED, skill=4, key="good").of("test")
POOR = make_system(LABELLED, skill=1, seed=1, key="poor").of("test")


def test_figures_are_those_of_the_answers():
    result = compare(POOR, GOOD, 0)
    for side, table in (("first", POOR), ("second", GOOD)):
        alone = intervals(table, 0)
        assert getattr(result.uar, side) == pytest.approx(alone.uar.value)
        assert getattr(result.recall["covid19"], side) == alone.recall["covid19"].value
    right = [(t["actual"] == t["predicted"]).to_numpy() for t in (POOR, GOOD)]
    assert result.only_first == (right[0] & ~right[1]).sum()
    assert result.only_second == (right[1] & ~right[0]).sum()
    assert (result.images, result.patients) == (len(GOOD), GOOD["patient_id"].nunique())
    assert result.uar.half_width == (result.uar.change.high - result.uar.change.low) / 2


def test_the_same_patients_are_drawn_for_both():
    bootstrap = Bootstrap(GOOD["patient_id"], GOOD["actual"], 0)
    net = bootstrap.count((GOOD["actual"] == GOOD["predicted"]).to_numpy())
    net = net - bootstrap.count((POOR["actual"] == POOR["predicted"]).to_numpy())
    drawn = (bootstrap.sums(net) / bootstrap.sums(bootstrap.images)).mean(axis=1)
    change = compare(POOR, GOOD, 0).uar.change
    assert (change.low, change.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_a_clear_difference_is_more_than_noise():
    result = compare(POOR, GOOD, 0)
    assert result.uar.beyond_noise
    assert result.uar.p < 0.01
    assert result.note == ONE_RUN


def test_identical_answers_do_not_differ():
    result = compare(GOOD, GOOD.sample(frac=1, random_state=0), 0)
    assert result.uar.change.value == 0
    assert not result.uar.beyond_noise
    assert result.uar.change.low < 0 < result.uar.change.high  # so few patients may hide one
    assert result.uar.p > 0.5
    assert result.unlike == 0


def test_constant_answers_differ_by_nothing_for_certain():
    answers = constant_system(LABELLED, "normal").of("test")
    change = compare(answers, answers, 0).uar.change
    assert (change.low, change.high) == (0, 0)


def test_chance_differences_are_seldom_more_than_noise():
    labelled = make_manifest(15, images=1, splits=("test",))
    beyond = [
        compare(
            make_system(labelled, 1.5, seed).of("test"),
            make_system(labelled, 1.5, seed + 1000).of("test"),
            seed,
            draws=1000,
        ).uar.beyond_noise
        for seed in range(40)
    ]
    assert np.mean(beyond) <= 0.18


def uar_of(answers):
    return classification_metrics(answers["actual"], answers["predicted"])["uar"]


def test_seeds_that_differ_widen_the_interval():
    runs = [make_system(LABELLED, skill, seed=7).of("test") for skill in (0.5, 2.5, 4.5)]
    alone = intervals(runs[1], 0).uar
    both = pooled(runs, 0).uar
    assert both.high - both.low > 1.3 * (alone.high - alone.low)
    result = compare(POOR, runs, 0)
    assert result.runs == (1, 3)
    assert result.uar.half_width > 1.2 * compare(POOR, runs[1], 0).uar.half_width
    assert result.uar.second == pytest.approx(np.mean([intervals(t, 0).uar.value for t in runs]))
    assert compare(runs, runs, 0).note == ""


def test_intervals_over_patients_and_runs_cover_the_truth():
    # The truth: the mean UAR of very many runs on very many patients.
    rng = np.random.default_rng(0)
    big = make_manifest(400, images=1, splits=("test",))
    few = make_manifest(20, images=1, splits=("test",))
    skills = 2 + rng.normal(size=40)
    truth = np.mean([uar_of(make_system(big, s, i).of("test")) for i, s in enumerate(skills)])
    hits = 0
    for seed in range(30):
        runs = [
            make_system(few, 2 + rng.normal(), seed=int(rng.integers(1e6))).of("test")
            for _ in range(4)
        ]
        found = pooled(runs, seed, 1000).uar
        hits += found.low <= truth <= found.high
    assert hits >= 23  # 93 % would give fewer in 1 of 1,000 cases


def test_other_images_or_labels_are_refused():
    with pytest.raises(InputError, match="1 images only in the first"):
        compare(GOOD, GOOD[1:], 0)
    with pytest.raises(InputError, match="another label or patient for 120"):
        compare(GOOD, GOOD.assign(actual="normal"), 0)
    with pytest.raises(InputError, match="more than once"):
        compare(pd.concat([GOOD, GOOD[:1]]), GOOD, 0)


def test_holm_and_p_values():
    assert holm([0.03, 0.01]) == pytest.approx([0.03, 0.02])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert p_value(np.ones(999)) == 0.002
    assert p_value(np.zeros(999)) == 1


# --- Primary comparisons ---------------------------------------------------------------------


def systems(**skill):
    made = {"good": make_system(LABELLED, 4, key="good")}
    for i, (key, value) in enumerate(skill.items()):
        made[key] = make_system(LABELLED, value, seed=10 + i, key=key, kind="blind")
    return made


def test_the_baseline_is_the_best_on_validation_not_on_test():
    made = systems(weak=0.5, strong=2)
    strong = made["strong"].answers
    strong.loc[strong["split"] == "test", "predicted"] = "normal"  # the worst on test
    table = primary_comparisons(made, "good", 0)
    assert [row["modality"] for row in table] == ["ct", "xray"]
    assert [row["p_holm"] for row in table] == holm([row["p"] for row in table])
    for row in table:
        assert (row["baseline"], row["baseline_uar"]) == ("strong", 0.5)
        assert row["difference"] == row["uar"] - 0.5
        assert row["better"]
        assert row["note"] == ONE_RUN


def test_a_system_no_better_than_the_baseline_is_not_called_better():
    table = primary_comparisons(systems(equal=4), "good", 0)
    assert [row["better"] for row in table] == [False, False]
