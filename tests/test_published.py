"""The published study's figures follow from its confusion matrices, by our metrics."""

import json

import numpy as np
import pytest
from support import BESIDE, ROOT

from chest.collections import xray_table
from chest.metrics import classification_metrics

PUBLISHED = BESIDE / "reference" / "published.json"
METADATA = BESIDE / "metadata"


def classify(confusion, labels):
    """Actual and predicted classes that give the confusion matrix, rows actual."""
    actual, predicted = np.nonzero(confusion)
    counts = np.array(confusion)[actual, predicted]
    names = np.array(labels)
    return np.repeat(names[actual], counts), np.repeat(names[predicted], counts)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"no published figures in {PUBLISHED}")
@pytest.mark.parametrize("system", ["zeroshot_siglip", "finetune_siglip"])
def test_every_printed_digit_follows(system):
    published = json.loads(PUBLISHED.read_text())
    printed, labels = published["systems"][system], published["class_order"]
    found = classification_metrics(*classify(printed["confusion"], labels))
    compared = 0
    for name, value in printed.items():
        if name == "confusion":
            continue
        values = value if isinstance(value, list) else [value]
        ours = (
            [found[name][label] for label in labels] if isinstance(value, list) else [found[name]]
        )
        assert [round(x, 4) for x in ours] == pytest.approx(values, abs=1e-9), name
        compared += len(values)
    assert compared >= 4


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"no published figures in {PUBLISHED}")
def test_the_published_uar_is_the_mean_of_its_recalls():
    published = json.loads(PUBLISHED.read_text())
    printed = published["systems"]["zeroshot_qwen"]
    assert round(float(np.mean(printed["recall"])), 4) == pytest.approx(printed["uar"], abs=1e-4)


@pytest.mark.skipif(not METADATA.is_dir(), reason=f"the published csv files are not in {METADATA}")
@pytest.mark.parametrize(
    ("labelling", "sick", "normal"), [("ptb", 345, 359), ("remarks", 393, 311)]
)
def test_the_study_took_48_normal_xrays_for_tuberculosis(labelling, sick, normal):
    problems = []
    counts = xray_table(METADATA / "MetaData.csv", labelling, problems)["label"].value_counts()
    assert counts.to_dict() == {"tuberculosis": sick, "normal": normal}
    assert not problems
    # The page says so.
    page = (ROOT / "docs" / "published-study.md").read_text()
    assert str(sick) in page
    assert str(normal) in page
