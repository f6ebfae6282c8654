"""Work shared by `accelerate launch`: two processes on the CPU give what one gives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from support import ROOT, environment, run_in
from test_ends import contents, undisturbed, zygote  # noqa: F401


def launching(*script):
    """The command that runs a script in two processes; without GPUs they run on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return ["env", "OMP_NUM_THREADS=1", "accelerate", "launch", "--multi_gpu", "--num_processes",
            "2", "--num_machines", "1", "--main_process_port", port, "--mixed_precision", "no",
            "--dynamo_backend", "no", *script]  # fmt: skip


def launch(folder, *script):
    """Run a script in two processes."""
    run_in(folder, *launching(*script))


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


@pytest.fixture(scope="module")
def trained(shared):
    """What two processes write that train together."""
    launch(shared, "stages/finetune_siglip.py")
    return contents(shared, "finetune_siglip")


def test_training_is_that_of_one_process(undisturbed, shared, trained):  # noqa: F811
    curves = []
    for folder in (undisturbed.folder, shared):
        curves.append(pd.read_csv(folder / "data/training/finetune_siglip.csv"))
    np.testing.assert_allclose(*curves, atol=1e-4)
    assert set(trained) == set(undisturbed.written["finetune_siglip"])


@pytest.mark.parametrize("struck", ["one process", "the launcher"])
def test_a_struck_training_goes_on_in_both_processes(shared, trained, struck):
    states, lock = shared / ".resume/finetune_siglip", shared / ".resume/finetune_siglip.lock"
    with subprocess.Popen(
        launching("stages/finetune_siglip.py"), cwd=shared, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(shared),
    ) as run:  # fmt: skip
        while not any(states.glob("step-*")):
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.01)
        if struck == "one process":
            os.kill(int(lock.read_text()), signal.SIGKILL)
        else:
            run.send_signal(signal.SIGTERM)
        printed, _ = run.communicate(timeout=60)
        assert run.returncode not in (0, None), printed
    assert contents(shared, "finetune_siglip") == trained
    printed = run_in(shared, "sh", "-c", '"$@" 2>&1', "sh", *launching("stages/finetune_siglip.py"))
    assert printed.count("Going on after step") == 1
    assert contents(shared, "finetune_siglip") == trained
    assert not states.exists()


def test_every_steps_loss_is_that_of_one_process(checkpoints, tmp_path):
    script = [str(ROOT / "tests" / "launched.py"), str(checkpoints / "siglip")]
    run_in(ROOT, "env", "OMP_NUM_THREADS=1", "python", *script, str(tmp_path / "one.json"))
    launch(ROOT, *script, str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["losses"]) == 50
    assert max(one["losses"]) - min(one["losses"]) > 0.1
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
