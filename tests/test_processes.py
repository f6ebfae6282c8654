"""Work shared by `accelerate launch`: two processes on the CPU give what one gives."""

import json
import shutil
import socket

import numpy as np
import pandas as pd
import pytest
from support import ROOT, run_in
from test_ends import contents, undisturbed, zygote  # noqa: F401


def launch(folder, *script):
    """Run a script in two processes; on a machine without GPUs they run on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run_in(folder, "env", "OMP_NUM_THREADS=1", "accelerate", "launch", "--multi_gpu",
           "--num_processes", "2", "--num_machines", "1", "--main_process_port", port,
           "--mixed_precision", "no", "--dynamo_backend", "no", *script)  # fmt: skip


@pytest.fixture(scope="module")
def shared(undisturbed):  # noqa: F811
    """A copy of the clone in which every stage ran in one process."""
    folder = undisturbed.folder.with_name("shared")
    return shutil.copytree(undisturbed.folder, folder, symlinks=True)


@pytest.mark.parametrize("stage", ["zeroshot_qwen", "zeroshot_siglip"])
def test_zero_shot_files_are_those_of_one_process(undisturbed, shared, stage):  # noqa: F811
    name = f"data/predictions/{stage}.csv"
    (shared / name).unlink()
    launch(shared, f"stages/{stage}.py")
    assert (shared / name).read_bytes() == undisturbed.written[stage][name]
    record = json.loads((shared / name).with_suffix(".json").read_text())
    assert record["processes"] == 2
    assert not (shared / ".resume" / stage).exists()


def test_training_is_that_of_one_process(undisturbed, shared):  # noqa: F811
    curves = []
    launch(shared, "stages/finetune_siglip.py")
    for folder in (undisturbed.folder, shared):
        curves.append(pd.read_csv(folder / "data/training/finetune_siglip.csv"))
    np.testing.assert_allclose(*curves, atol=1e-4)
    assert set(contents(shared, "finetune_siglip")) == set(undisturbed.written["finetune_siglip"])


def test_every_steps_loss_is_that_of_one_process(checkpoints, tmp_path):
    script = [str(ROOT / "tests" / "launched.py"), str(checkpoints / "siglip")]
    run_in(ROOT, "env", "OMP_NUM_THREADS=1", "python", *script, str(tmp_path / "one.json"))
    launch(ROOT, *script, str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 50
    assert max(one["losses"]) - min(one["losses"]) > 0.1
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
