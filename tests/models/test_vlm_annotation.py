"""Annotations come from the image alone, and survive their file."""

import numpy as np
import pandas as pd
import pytest
from support import run_stage, write_params

from chest.core.errors import InputError
from chest.core.params import load_params
from chest.data.annotations import read_annotations
from chest.data.dataset import MANIFEST, SPLIT, read_manifest
from chest.models.settings import AnnotationPrompts
from chest.models.vlm.annotation import one_line


@pytest.fixture
def annotated(study, checkpoints):
    block = {"checkpoint": str(checkpoints / "medgemma"), "revision": "main", "image_size": 112}
    block |= {"max_new_tokens": 4, "batch_size": 16}
    write_params(study, **{"phantom.annotate": block})
    run_stage("annotate")
    return study


def findings():
    return [*load_params().section("prompts.annotations", AnnotationPrompts).findings]


def test_no_label_reaches_the_annotations(annotated):
    path = annotated / "data/annotations.csv"
    expected = path.read_bytes()
    table = pd.read_csv(MANIFEST, dtype=str, keep_default_na=False)
    # All that could tell the class, but the order of the images and their modality.
    table["label"] = np.roll(table["label"], 1)
    table = table.assign(path="x", collection="x", site="x", patient_id="x", study="x")
    table.to_csv(MANIFEST, index=False)
    splits = pd.read_csv(SPLIT)
    splits.assign(split=splits["split"].to_numpy()[::-1]).to_csv(SPLIT, index=False)
    path.unlink()
    run_stage("annotate")
    assert path.read_bytes() == expected


def test_findings_are_likelihoods_and_texts_say_something(annotated):
    values, texts, made = read_annotations(read_manifest(), findings())
    assert values.shape == (40, 6)
    assert (values < 0).all()
    assert np.ptp(values, axis=0).min() > 1e-3
    assert len(set(texts)) > 2
    assert made["weights"] == "random"
    assert one_line("two\nlines \x00 and,\ttabs") == "two lines and, tabs"
    assert not (annotated / ".resume/annotate").exists()


def test_a_regression_on_the_findings_alone_is_a_system(annotated):
    run_stage("probe_findings")
    table = pd.read_csv("data/predictions/probe_findings.csv")
    assert list(table["image_id"]) == [f"image-{i:02}" for i in range(5, 40)]


def test_annotations_of_other_images_are_refused(annotated):
    other = read_manifest().iloc[::-1]
    with pytest.raises(InputError, match="other images"):
        read_annotations(other, findings())
