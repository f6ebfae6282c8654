"""The published study's figures follow from its confusion matrices, by our metrics."""

import json

import numpy as np
import pytest
from support import require_shared

from chest.evaluation.metrics import classification_metrics


@pytest.fixture(scope="module")
def published():
    return json.loads((require_shared("reference") / "published.json").read_text())


@pytest.mark.parametrize("system", ["zeroshot_siglip", "finetune_siglip"])
def test_every_printed_digit_follows(published, system):
    printed, labels = dict(published["systems"][system]), np.array(published["class_order"])
    confusion = np.array(printed.pop("confusion"))  # rows: actual
    actual, predicted = np.nonzero(confusion)
    counts = confusion[actual, predicted]
    found = classification_metrics(
        np.repeat(labels[actual], counts), np.repeat(labels[predicted], counts)
    )
    assert len(printed) >= 2
    for name, value in printed.items():
        per_class = isinstance(value, list)
        ours = [found[name][label] for label in labels] if per_class else [found[name]]
        assert np.round(ours, 4) == pytest.approx(value if per_class else [value], abs=1e-9), name


def test_the_published_uar_is_the_mean_of_its_recalls(published):
    printed = published["systems"]["zeroshot_qwen"]
    assert np.mean(printed["recall"]) == pytest.approx(printed["uar"], abs=1e-4)
