"""Which epoch is kept, by each validation figure."""

import numpy as np
import pandas as pd
import pytest

from chest.training.selection import best_epoch, validation_figures


def rows(**groups):
    """Build a table from counts: ``covid19_ct=4`` is four COVID-19 CTs."""
    names = [name.split("_") for name, count in groups.items() for _ in range(count)]
    return pd.DataFrame(names, columns=["label", "modality"])


def test_figures_by_hand():
    table = rows(covid19_ct=4, normal_ct=2, normal_xray=2, tuberculosis_xray=1)
    predicted = np.array(
        [
            "covid19",
            "covid19",
            "covid19",
            "normal",
            "normal",
            "covid19",
            "normal",
            "tuberculosis",
            "tuberculosis",
        ]
    )
    assert validation_figures(table, predicted) == pytest.approx(
        {
            "val_uar": (3 / 4 + 2 / 4 + 1) / 3,
            "val_war": 6 / 9,
            "val_within": ((3 / 4 + 1 / 2) / 2 + (1 / 2 + 1) / 2) / 2,
            "val_worst": 2 / 4,
        }
    )


def test_within_leaves_out_a_modality_of_one_class():
    table = rows(covid19_ct=1, normal_ct=1, tuberculosis_xray=2)
    predicted = np.array(["covid19", "covid19", "normal", "normal"])
    assert validation_figures(table, predicted)["val_within"] == 0.5
    only = validation_figures(rows(covid19_ct=1, tuberculosis_xray=1), np.array(["covid19"] * 2))
    assert only["val_within"] == only["val_uar"] == 0.5


def epoch(number, uar, within, worst, loss=1.0):
    figures = {"val_uar": uar, "val_within": within, "val_worst": worst}
    return {"epoch": number, "val_loss": loss, **figures}


def test_each_figure_selects_its_own_epoch():
    curve = [epoch(1, 0.9, 0.1, 0.2), epoch(2, 0.5, 0.9, 0.2), epoch(3, 0.5, 0.1, 0.9)]
    assert [best_epoch(curve, by) for by in ("uar", "within", "worst")] == [1, 2, 3]


def test_ties_go_to_the_lower_loss_then_to_the_earlier_epoch():
    curve = [epoch(i, 0.5, 0.5, 0.5, loss) for i, loss in enumerate([2.0, 1.0, 1.0], 1)]
    assert best_epoch(curve, "uar") == 2
    noisy = [epoch(1, 0.5, 0.5, 0.5), epoch(2, 0.5 + 1e-9, 0.5, 0.5, 1 - 1e-9)]
    assert best_epoch(noisy, "uar") == 1
