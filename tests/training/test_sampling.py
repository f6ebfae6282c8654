"""Class balance: how often an image is drawn, and the adjusted loss."""

import numpy as np
import pandas as pd
import pytest

from chest.core.labels import LABELS
from chest.training.sampling import draw_epoch, logit_adjustment, sampling_weights

TABLE = pd.DataFrame(
    [("covid19", "ct")] * 60
    + [("normal", "ct")] * 25
    + [("normal", "xray")] * 10
    + [("tuberculosis", "xray")] * 5,
    columns=["label", "modality"],
)


@pytest.mark.parametrize(
    ("balance", "columns", "groups"),
    [
        ("class", ["label"], 3),
        ("class_modality", ["label", "modality"], 4),
    ],
)
def test_groups_are_drawn_equally_often(balance, columns, groups):
    weights = sampling_weights(TABLE, balance)
    shares = pd.Series(weights).groupby([TABLE[column] for column in columns]).sum()
    assert shares.tolist() == pytest.approx([1 / groups] * groups)
    drawn = draw_epoch(100, weights, (20, 5000), np.random.default_rng(0))
    counts = TABLE.iloc[drawn.ravel()].value_counts(columns, normalize=True)
    assert counts.tolist() == pytest.approx([1 / groups] * groups, abs=0.03)


def test_without_weights_each_image_comes_once_and_the_last_batch_is_filled():
    assert sampling_weights(TABLE, "none") is None
    assert sampling_weights(TABLE, "logit_adjusted") is None
    drawn = draw_epoch(100, None, (13, 8), np.random.default_rng(0))
    assert drawn.shape == (13, 8)
    assert sorted(drawn.ravel()[:100]) == list(range(100))
    assert drawn.ravel()[100:].tolist() == drawn.ravel()[:4].tolist()


@pytest.mark.parametrize("balance", ["none", "class"])
def test_the_generator_decides_what_is_drawn(balance):
    weights = sampling_weights(TABLE, balance)
    one, same, other = (
        draw_epoch(100, weights, (13, 8), np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_adjustment_is_the_logarithm_of_the_class_shares():
    targets = TABLE["label"].map(LABELS.index).to_numpy()
    assert logit_adjustment(targets, "logit_adjusted").exp().tolist() == pytest.approx(
        [0.6, 0.35, 0.05]
    )
    assert logit_adjustment(targets, "class").tolist() == [0, 0, 0]
    assert logit_adjustment(np.array([0, 0, 1]), "logit_adjusted").isfinite().all()
