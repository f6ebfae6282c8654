"""The audit of synthetic images: copies are found, and the measures have their known values."""

import numpy as np
import pandas as pd
import pytest

from chest.evaluation.synthetic import (
    Described,
    Limits,
    audit_figures,
    find_copies,
    kid,
    membership_test,
    nearest,
    precision_recall,
    probe_auroc,
    squared_mmd,
    standardize,
)

LIMITS = Limits(hash_bits=24, percentile=5.0)
N, WIDTH = 100, 16


def describe(features, rng, hashes=None, **columns):
    """Return tuberculosis X-rays with these features, and other hashes if none are given."""
    if hashes is None:
        hashes = rng.integers(0, 2**64, (len(features), 4), np.uint64)
    table = pd.DataFrame({"label": "tuberculosis", "modality": "xray"}, index=range(len(features)))
    return Described(table.assign(**columns), features, hashes)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def real(rng):
    """Images of N patients in training, and of half as many in validation and in test."""
    splits = np.repeat(["train", "val", "test"], [N, N // 2, N // 2])
    ids = [f"image-{i:03}" for i in range(2 * N)]
    features = rng.normal(size=(2 * N, WIDTH))
    return describe(features, rng, image_id=ids, patient_id=ids, split=splits)


def copies(real, rows, method, **columns):
    """Return synthetic images that are real ones."""
    ids = [f"{method}-{i}" for i in range(len(rows))]
    features, hashes = real.features[rows], real.hashes[rows]
    return describe(features, None, hashes, synthetic_id=ids, method=method, **columns)


@pytest.mark.parametrize("method", ["duplicates", "diffusion"])
def test_every_copy_is_found_and_those_of_a_generator_are_dropped(real, method):
    found = find_copies(real, copies(real, np.arange(N), method), LIMITS)
    assert found["near_copy"].all()
    assert (found["dropped"] == (method == "diffusion")).all()
    for column in ("nearest", "hash_nearest"):
        assert found[column].tolist() == real.table["image_id"][:N].tolist()
    assert found[["bits", "distance", "ratio", "percentile"]].max().max() == 0


def test_a_copy_is_found_by_hash_or_by_features_alone(real, rng):
    made = copies(real, np.arange(4), "diffusion")
    made.features[:2] = rng.normal(size=(2, WIDTH)) * 3
    made.hashes[2:] = rng.integers(0, 2**64, (2, 4), np.uint64)
    made.hashes[0, 0] ^= np.uint64(2**24 - 1)
    found = find_copies(real, made, LIMITS)
    assert found["near_copy"].all()
    assert found["bits"][0] == 24
    assert (found["bits"][2:] > 60).all()
    assert (found["percentile"][:2] > 5).all()


def test_images_of_the_same_distribution_are_rarely_taken_for_copies(real, rng):
    made = describe(rng.normal(size=(400, WIDTH)), rng, synthetic_id=range(400), method="diffusion")
    found = find_copies(real, made, LIMITS)
    assert 0.01 < found["near_copy"].mean() < 0.1
    assert found["percentile"].median() == pytest.approx(50, abs=10)


def test_slices_of_one_patient_do_not_hide_that_one_is_copied():
    points = np.array([[0.0], [0.1], [4.0], [7.0]])
    patients = np.array(["a", "a", "b", "c"])
    rows, first, second = nearest(np.array([[0.0]]), points, patients)
    assert (rows[0], first[0], second[0]) == (0, 0, 4)
    # Of real images, those of their own patient do not count.
    rows, first, second = nearest(points, points, patients, patients)
    assert rows.tolist() == [2, 2, 3, 2]
    assert first.tolist() == [4, 3.9, 3, 3]
    assert second.tolist() == [7, 6.9, 3.9, 6.9]


@pytest.mark.parametrize(("source", "low"), [("train", "p_train"), ("test", "p_test"), ("", "")])
def test_who_was_seen_shows_in_the_nearest_images(real, rng, source, low):
    # Blurred beyond what can be called a copy.
    rows = np.flatnonzero(real.table["split"] == source)[:40]
    features = rng.normal(size=(40, WIDTH))
    if source:
        features = real.features[rows] + 0.5 * features
    made = describe(features, rng, synthetic_id=range(40), method="diffusion")
    found = find_copies(real, made, LIMITS)
    figures = membership_test(found, real.table, seed=0)
    assert figures["by_chance"] == pytest.approx(1 / 3, abs=0.02)
    for name in ("p_train", "p_test"):
        assert (figures[name] < 0.001) == (name == low), figures


def test_a_class_that_is_rare_in_training_is_near_to_test_images_by_chance(real, rng):
    # Normal images, all in training, lie elsewhere: they say nothing.
    normal = real.where(split="train")
    normal = describe(
        normal.features + 50,
        rng,
        **normal.table.assign(image_id=range(N), patient_id=range(N), label="normal"),
    )
    rare = real.take(np.arange(N - 20, 2 * N))
    table = pd.concat([normal.table, rare.table], ignore_index=True)
    both = Described(
        table,
        *(
            np.concatenate(x)
            for x in ((normal.features, rare.features), (normal.hashes, rare.hashes))
        ),
    )
    made = describe(rng.normal(size=(40, WIDTH)), rng, synthetic_id=range(40), method="diffusion")
    figures = membership_test(find_copies(both, made, LIMITS), both.table, seed=0)
    assert figures["by_chance"] == pytest.approx(50 / 70, abs=0.02)
    assert min(figures["p_train"], figures["p_test"]) > 0.05


def test_squared_mmd_by_hand():
    # k(0,1) = 1; k(1,2) = 27; between: (1 + 1 + 8 + 27) / 4.
    assert squared_mmd(np.array([[0.0], [1]]), np.array([[1.0], [2]])) == 1 + 27 - 2 * 9.25
    # Two features, kernel (x·y / 2 + 1) ** 3: 1 within, 3.375 within; between (1 + 1 + 8 + 1) / 4.
    x, y = np.array([[0.0, 0], [2, 0]]), np.array([[1.0, 0], [0, 1]])
    assert squared_mmd(x, y) == 1 + 1 - 2 * (1 + 1 + 8 + 1) / 4


def test_kid_of_the_same_distribution_is_nothing_within_its_spread(rng):
    x, same, other = (rng.normal(size=(300, 8)) + shift for shift in (0, 0, 0.5))
    value, spread = kid(x, same, seed=0)
    assert abs(value) < spread
    value, spread = kid(x, other, seed=0)
    assert value > 3 * spread


def test_precision_and_recall_of_known_sets(rng):
    cloud = rng.normal(size=(40, 2))
    far = cloud + 100
    both = np.concatenate([cloud, far])
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, far) == (0, 0)
    assert precision_recall(both, cloud) == (1, 0.5)  # half of what is real is missing
    assert precision_recall(cloud, both) == (0.5, 1)  # half of what was made is not real


def test_the_probe_tells_others_apart_but_not_copies(rng):
    real, same = rng.normal(size=(2, 80, 6))
    ids = np.arange(80)
    assert probe_auroc(real, same, (ids, ids), 0) == pytest.approx(0.5, abs=0.15)
    assert probe_auroc(real, same + 3, (ids, ids), 0) > 0.99
    # Ten copies of each of eight images, in many features: known again, unless kept together.
    real, few = rng.normal(size=(80, 200)), rng.normal(size=(8, 200)).repeat(10, axis=0)
    assert probe_auroc(real, few, (ids, ids), 0) > 0.95
    assert probe_auroc(real, few, (ids, ids // 10), 0) < 0.75


def test_figures_of_copies_are_those_of_training_images(real):
    made = copies(real, np.arange(N), "duplicates")
    known, own = standardize(real, made)
    found = find_copies(known, own, LIMITS)
    figures = audit_figures(known, own, found, LIMITS, seed=0)
    assert figures["n"] == N
    own = figures["duplicates"]["tuberculosis_xray"]
    assert (own["n"], own["near_by_hash"], own["near_by_features"]) == (N, N, N)
    assert own["dropped"] == 0
    assert own["p_train"] < 0.001
    floor = own.pop("floor")
    assert floor["kid"] == pytest.approx(own["kid"], abs=own["kid_sd"])
    for name in ("precision", "recall"):
        assert floor[name] == own[name] > 0.7
    train = known.where(split="train").features
    assert train.mean() == pytest.approx(0)
    assert train.var(axis=0).mean() == pytest.approx(1)
