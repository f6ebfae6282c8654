"""The whole pipeline by DVC itself, in a copy of the repository with a short training."""

import json
import re
import time

import pandas as pd
import pytest
import yaml
from support import commit, copy_repository, run_in, write_params

SHORT = {
    "encoders": ["resnet50"],
    "phantom.finetune_siglip.epochs": 1,
    "phantom.finetune_siglip.warmup_steps": 2,
    "phantom.finetune_cnn.resnet50.epochs": 1,
    "phantom.finetune_cnn.efficientnet_b0.epochs": 1,
    "phantom.segment_lungs.epochs": 1,
}

TOY_STAGE = '''"""Answer by the mean grey of each image."""

import numpy as np

from chest.core.params import Section, load_params
from chest.core.runtime import run_stage
from chest.data.dataset import read_dataset
from chest.evaluation import predictions


class Settings(Section):
    image_size: int
    threshold: float


def main() -> None:
    settings = load_params().system("grey_mean", Settings)
    data = read_dataset("val", "test", side=settings.image_size)
    rows = data.rows("val", "test", "external")
    bright = data.images[rows].mean(axis=(1, 2)) > settings.threshold
    probabilities = np.where(bright[:, None], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1])
    table = predictions.tabulate(data.table.iloc[rows], probabilities)
    record = predictions.Record(name="Grey mean", kind="trained", n=len(rows))
    predictions.write("grey_mean", table, record)


if __name__ == "__main__":
    run_stage(main)
'''

TOY_DVC = """
  grey_mean:
    cmd: python stages/grey_mean.py
    deps:
      - data/images
      - data/manifest.csv
      - data/split.csv
      - stages/grey_mean.py
      - chest/core
      - chest/data/dataset.py
      - chest/evaluation/predictions.py
    params:
      - ${profile}.grey_mean
    outs:
      - data/predictions/grey_mean.csv
      - data/predictions/grey_mean.json

  evaluate:
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Run the pipeline in a copy of the repository, and commit what it wrote."""
    folder = copy_repository(tmp_path_factory.mktemp("pipeline") / "copy")
    write_params(folder, **SHORT)
    run_in(folder, "dvc", "repro")
    commit(folder)
    return folder


def stale(folder) -> set[str]:
    """Return the stages that `dvc status` names."""
    return {*json.loads(run_in(folder, "dvc", "status", "--json"))}


def test_a_second_run_has_nothing_to_do(pipeline):
    start = time.monotonic()
    run_in(pipeline, "dvc", "repro")
    assert time.monotonic() - start < 15  # 2 s on an idle machine
    assert run_in(pipeline, "git", "status", "--porcelain") == ""


def test_dvc_shows_metrics_and_plots(pipeline):
    metrics = run_in(pipeline, "dvc", "metrics", "show", "--md")
    assert "finetune_siglip.uar" in metrics
    run_in(pipeline, "dvc", "plots", "show", "--out", "shown")
    page = (pipeline / "shown" / "index.html").read_text()
    assert "finetune_siglip" in page


def test_an_xray_that_is_added_cuts_no_volume_again(pipeline):
    images = pipeline / "data/raw/phantom/chest-x-ray-lungs-segmentation/Chest-X-Ray"
    (images / "note.txt").write_text("beside the collection's folders")
    try:
        assert stale(pipeline) == {"index_collections", "data/dvc.yaml:draw_phantoms"}
    finally:
        (images / "note.txt").unlink()


def test_the_checkpoint_of_one_model_concerns_no_other(pipeline):
    path = pipeline / "data/checkpoints/phantom/qwen/generation_config.json"
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    try:
        asked = {"annotate", "finetune_qwen", "probe_vlm", "zeroshot_qwen"}
        assert stale(pipeline) == asked | {"data/dvc.yaml:make_checkpoints"}
    finally:
        path.write_bytes(before)


def test_leftover_predictions_are_refused(pipeline):
    for suffix in (".csv", ".json"):
        source = pipeline / f"data/predictions/zeroshot_qwen{suffix}"
        source.with_stem("gone_system").write_bytes(source.read_bytes())
    try:
        message = run_in(pipeline, "python", "stages/evaluate.py", fails=True)
        assert "gone_system" in message
    finally:
        for path in (pipeline / "data/predictions").glob("gone_system*"):
            path.unlink()


def test_a_new_system_is_one_new_place(pipeline):
    (pipeline / "stages/grey_mean.py").write_text(TOY_STAGE)
    params = yaml.safe_load((pipeline / "params.yaml").read_text())
    for profile in ("phantom", "study"):
        side = params[profile]["image_sizes"][0]
        params[profile]["grey_mean"] = {"image_size": side, "threshold": 100.0}
    (pipeline / "params.yaml").write_text(yaml.safe_dump(params))
    dvc = (pipeline / "dvc.yaml").read_text()
    (pipeline / "dvc.yaml").write_text(dvc.replace("\n  evaluate:\n", TOY_DVC, 1))

    assert stale(pipeline) == {"grey_mean", "evaluate"}
    ran = run_in(pipeline, "dvc", "repro")
    assert re.findall(r"Running stage '(.+)'", ran) == ["grey_mean", "evaluate"]

    test = json.loads((pipeline / "metrics/test.json").read_text())
    answers = pd.read_csv(pipeline / "metrics/answers.csv")
    assert test["grey_mean"]["uar"] > 0
    assert any(column.startswith("grey_mean") for column in answers)
    assert "grey_mean" in (pipeline / "plots/uar.csv").read_text()
    assert "Grey mean" in (pipeline / "metrics/model_card.md").read_text()
    run_in(pipeline, "python", "tools/review.py", "HEAD", "--out", "review")
    assert "Grey mean" in (pipeline / "review/report.md").read_text()
    assert "Grey mean" in (pipeline / "review/report.html").read_text()
