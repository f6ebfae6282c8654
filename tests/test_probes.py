"""Probes: the right part of the image is hidden, and a scanner's mark is found out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import load_script, run_stage, write_params

from chest import predictions
from chest.compute import find_checkpoint, load_normalization
from chest.dataset import MANIFEST_COLUMNS
from chest.files import replacing
from chest.labels import LABELS
from chest.regions import HIDDEN, visible_region
from chest.siglip import load_classifier, save_classifier
from chest.systems import PROBES


def test_regions():
    lungs, rest, border = (
        visible_region(probe, 100) for probe in ("lungs_only", "lungs_hidden", "border_only")
    )
    assert np.array_equal(rest, ~lungs)
    assert lungs.mean() == pytest.approx(0.7 * 0.8)
    assert lungs[50, 50]
    assert not lungs[10].any()
    assert border.mean() == pytest.approx(1 - 0.84**2)
    assert border[0].all()
    assert border[:, -1].all()
    assert not (border & lungs).any()


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_hidden_does_not_matter_and_the_rest_stays(probe):
    stage = load_script("stages/probe_shortcuts.py")
    images = torch.rand(2, 1, 64, 64)
    shown = stage.hide(probe)(images)
    visible = torch.from_numpy(visible_region(probe, 64))
    assert torch.equal(shown[..., visible], images[..., visible])
    assert (shown[..., ~visible] == HIDDEN).all()


def test_the_stage_hides_what_it_says(tmp_path, monkeypatch, checkpoints):
    # Two images that differ in the middle alone, two that differ at the border alone.
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    with replacing("models/finetune_siglip") as folder:
        save_classifier(load_classifier(source, 224), load_normalization(source), folder)
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (1, 224, 224)), 3, axis=0).astype(np.uint8)
    images[1, 90:130, 90:130] = 0
    images[2, :10] = 0
    np.save(tmp_path / "images.npy", images)
    Path("data").mkdir()
    (tmp_path / "images.npy").rename("data/images.npy")
    table = pd.DataFrame("x", index=range(3), columns=list(MANIFEST_COLUMNS))
    table = table.assign(image_id=["a", "b", "c"], label=list(LABELS), modality="ct")
    table.to_csv("data/manifest.csv", index=False)
    table.assign(split="test")[["image_id", "split"]].to_csv("data/split.csv", index=False)

    run_stage("probe_shortcuts")
    answers = {
        probe: predictions.read(probe, table.assign(split="test"), predictions.PROBES)
        for probe in PROBES
    }
    a, b, c = range(3)

    def same(probe, first, second):
        rows = answers[probe][list(LABELS)].to_numpy()
        return np.array_equal(rows[first], rows[second])

    assert [same("lungs_only", a, b), same("lungs_only", a, c)] == [False, True]
    for probe in ("lungs_hidden", "border_only"):
        assert [same(probe, a, b), same(probe, a, c)] == [True, False]
    assert predictions.record_path_of("lungs_only", predictions.PROBES).is_file()
