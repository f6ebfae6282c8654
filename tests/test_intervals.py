"""Intervals: against drawn data with a known truth, against SciPy, and where nothing varies."""

import math
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, bootstrap

from chest import intervals as module
from chest.intervals import DRAWS, FEWEST_DRAWS, ResamplingError, cohort_of, intervals, resample
from chest.labels import LABELS, UNPARSED
from chest.metrics import MetricsError, classification_metrics

SIZES = np.arange(1, 10)  # images a patient has, each number equally likely


# --- Drawn data with a known truth -----------------------------------------------------------


def accuracies(recall):
    """The mean accuracy of patients with each of SIZES: those with many images do worse."""
    return np.where(SIZES < 5, recall + 0.05, recall - 0.05)


def draw_answers(rng, people, recalls):
    """Answers to the images of so many patients a class, each with an accuracy of its own."""
    n = rng.choice(SIZES, sum(people))
    label = np.repeat(np.arange(len(people)), people)
    mean = np.array([accuracies(recall) for recall in recalls])[label, n - 1]
    accuracy = rng.beta(3 * mean, 3 * (1 - mean))
    label, accuracy, patient = (np.repeat(x, n) for x in (label, accuracy, np.arange(len(n))))
    wrong = rng.random(len(label)) >= accuracy
    names = np.array(LABELS, dtype=object)
    return pd.DataFrame(
        {
            "actual": names[label],
            "predicted": names[(label + wrong) % len(LABELS)],
            "patient_id": [f"p{i:06}" for i in patient],
        }
    )


def true_figures(people, recalls):
    """UAR and WAR that endless data would show: a recall is E[right answers] / E[images]."""
    recall = np.array([(SIZES * accuracies(r)).sum() / SIZES.sum() for r in recalls])
    return recall.mean(), recall @ people / sum(people)


def coverage(repetitions, by_patient=True):
    """How often the intervals of UAR and WAR hold the truth."""
    people, recalls = (60, 50, 30), (0.8, 0.7, 0.6)
    truth = true_figures(people, recalls)
    rng = np.random.default_rng(1)
    held = np.zeros(2)
    for seed in range(repetitions):
        table = draw_answers(rng, people, recalls)
        if not by_patient:
            table["patient_id"] = np.arange(len(table))
        own = intervals(table, seed, FEWEST_DRAWS)
        pairs = zip(truth, (own.uar, own.war), strict=True)
        held += [each.low <= true <= each.high for true, each in pairs]
    return held / repetitions


def test_the_interval_holds_the_truth_as_often_as_it_says():
    uar, war = coverage(500)
    assert 0.92 <= uar <= 0.98
    assert 0.92 <= war <= 0.98


def test_drawing_images_instead_of_patients_would_hold_it_too_rarely():
    # This is why patients are drawn; also, the test above can fail.
    uar, war = coverage(100, by_patient=False)
    assert uar < 0.9
    assert war < 0.9


# --- The draws -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers():
    """Answers with patients of one class, and some of two."""
    table = draw_answers(np.random.default_rng(7), (25, 20, 12), (0.8, 0.7, 0.6))
    covid = table.index[table["actual"] == "covid19"][:40]
    table.loc[covid[::3], ["actual", "predicted"]] = "normal"
    table.loc[covid[1::9], "predicted"] = UNPARSED
    return table


def drawn_one_by_one(table, draws):
    """UAR, WAR and recalls, (draws, 2 + C), of answers put together patient by patient."""
    rng = np.random.default_rng(0)
    coded = pd.DataFrame(
        {
            "actual": table["actual"].map(LABELS.index),
            "right": table["actual"] == table["predicted"],
        }
    )
    strata = {}
    for _, own in coded.groupby(table["patient_id"]):
        strata.setdefault(frozenset(own["actual"]), []).append(own.to_numpy(int))
    figures = []
    for _ in range(draws):
        drawn = [s[i] for s in strata.values() for i in rng.integers(len(s), size=len(s))]
        actual, right = np.concatenate(drawn).T
        recalls = [right[actual == k].mean() for k in range(len(LABELS))]
        figures.append([np.mean(recalls), right.mean(), *recalls])
    return np.array(figures)


def test_limits_are_those_of_tables_put_together_from_drawn_patients(answers):
    own = intervals(answers, 0, 20 * DRAWS)
    plain = np.quantile(drawn_one_by_one(answers, 1000), [0.025, 0.975], axis=0).T
    for each, limits in zip((own.uar, own.war, *own.recall.values()), plain, strict=True):
        width = each.high - each.low
        assert [each.low, each.high] == pytest.approx(limits, abs=0.08 * width)


def test_limits_are_those_of_scipy_where_each_patient_has_one_image():
    right = np.random.default_rng(3).random(200) < 0.8
    predicted = np.where(right, "normal", "covid19")
    table = pd.DataFrame({"actual": "normal", "predicted": predicted})
    own = intervals(table.assign(patient_id=table.index.astype(str)), 0, 20_000)
    theirs = bootstrap(
        (right,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    for each in (own.uar, own.war, own.recall["normal"]):
        assert each.low == pytest.approx(theirs.low, abs=1.01 / 200)  # within one image
        assert each.high == pytest.approx(theirs.high, abs=1.01 / 200)


def test_every_draw_takes_as_many_patients_of_each_stratum_as_there_are(answers):
    cohort = cohort_of(answers)
    assert len(cohort.strata) == 4  # of the three classes, and of COVID-19 with normal
    assert sorted(np.concatenate(cohort.strata)) == list(range(57))
    member = np.zeros((57, 4))
    for k, members in enumerate(cohort.strata):
        member[members, k] = 1
    assert (resample(cohort, [member], 1, DRAWS)[0] == member.sum(0)).all()


def test_the_same_seed_draws_the_same_patients_whatever_is_counted(answers):
    cohort = cohort_of(answers)
    right = cohort.count((answers["actual"] == answers["predicted"]).to_numpy())
    images, rights = resample(cohort, [cohort.images, right], 5, DRAWS)
    assert (resample(cohort, [right], 5, DRAWS)[0] == rights).all()
    assert (rights <= images).all()
    assert (resample(cohort, [right], 6, DRAWS)[0] != rights).any()


def test_neither_the_order_of_rows_nor_the_memory_at_hand_matters(answers, monkeypatch):
    own = intervals(answers, 42)
    assert intervals(answers.sample(frac=1, random_state=0), 42) == own
    assert intervals(answers, 43) != own
    monkeypatch.setattr(module, "CHUNK", 100)
    assert intervals(answers, 42) == own


def test_values_are_those_of_the_metrics_and_lie_within_the_limits(answers):
    own = intervals(answers, 42)
    metrics = classification_metrics(answers["actual"], answers["predicted"])
    assert own.uar.value == metrics["uar"]
    assert own.war.value == metrics["war"]
    assert {label: each.value for label, each in own.recall.items()} == metrics["recall"]
    for each in (own.uar, own.war, *own.recall.values()):
        assert each.low < each.value < each.high


# --- Where nothing varies --------------------------------------------------------------------


def table_of(*patients):
    """A table of patients, each (class, right answers, images)."""
    rows = [
        (label, label if i < right else "unparsed", f"p{k}")
        for k, (label, right, images) in enumerate(patients)
        for i in range(images)
    ]
    return pd.DataFrame(rows, columns=["actual", "predicted", "patient_id"])


MIXED = [("covid19", k % 3, 3) for k in range(30)]


@pytest.mark.parametrize("images", [1, 30])
@pytest.mark.parametrize("right", [True, False])
def test_ten_patients_all_right_or_all_wrong_prove_little(images, right):
    sick = [("tuberculosis", images * right, images)] * 10
    own = intervals(table_of(*MIXED, *sick), 0, 50_000).recall["tuberculosis"]
    # The Jeffreys interval of ten patients, however many images they have.
    if right:
        assert (own.value, own.high) == (1, 1)
        assert own.low == pytest.approx(beta.ppf(0.025, 10.5, 0.5), abs=0.01)
    else:
        assert (own.value, own.low) == (0, 0)
        assert own.high == pytest.approx(beta.ppf(0.975, 0.5, 10.5), abs=0.01)


def test_uar_and_war_share_the_doubt():
    own = intervals(table_of(*[(label, 2, 2) for label in LABELS for _ in range(10)]), 0)
    for each in (own.uar, own.war):
        assert each.value == each.high == 1
        assert 0.8 < each.low < 0.97
    # WAR as well where only one of two classes has no spread: half of the images are of it.
    normal = [("normal", 3, 3)] * 30
    spread = intervals(table_of(*MIXED, *normal), 0, 50_000)
    bare = np.std([k % 3 / 3 for k in range(30)]) / math.sqrt(30) / 2
    doubt = beta.std(30.5, 0.5) / 2
    expected = 2 * 1.96 * math.hypot(bare, doubt)
    assert spread.war.high - spread.war.low == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("right", "images"), [(0, 1), (1, 1), (3, 4), (20, 40)])
def test_a_single_patient_says_next_to_nothing(right, images):
    own = intervals(table_of(*MIXED, ("normal", right, images)), 0, 50_000).recall["normal"]
    share = right / images
    low, high = beta.ppf([0.025, 0.975], share + 0.5, 1 - share + 0.5)
    assert own.low == pytest.approx(min(low, share), abs=0.01)
    assert own.high == pytest.approx(max(high, share), abs=0.01)
    assert own.high - own.low > 0.8


def test_patients_with_equal_shares_of_right_answers_are_no_certainty():
    own = intervals(table_of(*[("normal", k, 2 * k) for k in range(1, 9)]), 0, 50_000)
    low, high = beta.ppf([0.025, 0.975], 4.5, 4.5)
    assert own.recall["normal"].low == pytest.approx(low, abs=0.01)
    assert own.recall["normal"].high == pytest.approx(high, abs=0.01)


def test_patients_that_are_each_alone_in_a_stratum_are_no_certainty():
    # One patient with normal images alone, one with both: each is in every draw.
    both = table_of(("normal", 1, 2), ("covid19", 2, 2))
    both.loc[both["actual"] == "covid19", "patient_id"] = "p0"
    own = intervals(pd.concat([both, table_of(*[("normal", 3, 3)] * 2)[3:]]), 0)
    assert own.recall["normal"].value == pytest.approx(0.8)
    assert own.recall["normal"].high - own.recall["normal"].low > 0.5


def test_one_class_alone_is_its_own_uar_and_war():
    own = intervals(table_of(*MIXED), 0)
    assert set(own.recall) == {"covid19"}
    assert own.uar == own.war == own.recall["covid19"]


def test_any_table_has_limits_around_each_value():
    rng = np.random.default_rng(11)
    for seed in range(40):
        n = rng.integers(1, 12)
        table = pd.DataFrame(
            {
                "actual": rng.choice(LABELS[: rng.integers(1, 4)], n),
                "predicted": rng.choice([*LABELS[: rng.integers(1, 4)], UNPARSED], n),
                "patient_id": rng.choice([f"p{i}" for i in range(rng.integers(1, 6))], n),
            }
        )
        own = intervals(table, seed, FEWEST_DRAWS)
        for each in (own.uar, own.war, *own.recall.values()):
            assert 0 <= each.low <= each.value <= each.high <= 1
            assert each.low < each.high


# --- What is refused, and what it costs ------------------------------------------------------


def test_what_cannot_be_resampled_is_refused(answers):
    with pytest.raises(MetricsError, match="no answers"):
        intervals(answers[:0], 0)
    for nobody in ("", None):
        with pytest.raises(ResamplingError, match="without a patient_id"):
            intervals(answers.assign(patient_id=nobody), 0)
    for seed, draws in ((0, FEWEST_DRAWS - 1), (0, 10**9), (-1, DRAWS)):
        with pytest.raises(ResamplingError, match="draws found"):
            intervals(answers, seed, draws)


def test_the_whole_study_takes_seconds():
    table = draw_answers(np.random.default_rng(0), (1650, 1450, 345), (0.9, 0.8, 0.7))
    assert len(table) > 16_300
    began = time.perf_counter()
    intervals(table, 0)
    assert time.perf_counter() - began < 20  # a third of what three systems may take


def test_ten_times_the_study_fits_into_little_memory():
    table = draw_answers(np.random.default_rng(0), (16_500, 14_500, 3_450), (0.9, 0.8, 0.7))
    cohort = cohort_of(table)
    right = cohort.count((table["actual"] == table["predicted"]).to_numpy())
    tracemalloc.start()
    resample(cohort, [cohort.images, right], 0, FEWEST_DRAWS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6
