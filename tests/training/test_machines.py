"""The same training on other processors, with other threads, and in two processes."""

import json
import socket
from pathlib import Path

import numpy as np
import pandas as pd
from case import SYSTEM, write_case
from support import ROOT, run_in

STAGE = str(ROOT / "stages" / f"{SYSTEM}.py")
CURVE, ANSWERS = Path(f"data/training/{SYSTEM}.csv"), Path(f"data/predictions/{SYSTEM}.csv")
# Stands in for a processor without AVX: other kernels, other orders of summation.
OTHER_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


def launcher() -> list[str]:
    """Command that runs a script in two processes, on the CPU if there is no GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = {"num_processes": "2", "num_machines": "1", "main_process_port": port}
    options |= {"mixed_precision": "no", "dynamo_backend": "no"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ["accelerate", "launch", "--multi_gpu", *words]


def run(folder: Path, checkpoint: Path, *command: str, **env: str) -> None:
    """Run the stage in `folder` by a command of its own."""
    write_case(folder, checkpoint)
    run_in(folder, *command, STAGE, PYTHONPATH=str(ROOT), OMP_WAIT_POLICY="passive", **env)


def numbers(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).select_dtypes("number")


def test_other_kernels_and_threads_give_the_same_curve_and_answers(checkpoint, peaceful, tmp_path):
    run(tmp_path, checkpoint, "python", OMP_NUM_THREADS="2", **OTHER_KERNELS)
    assert (tmp_path / CURVE).read_bytes() == (peaceful / CURVE).read_bytes()
    here, there = (pd.read_csv(folder / ANSWERS) for folder in (peaceful, tmp_path))
    assert here["predicted"].equals(there["predicted"])
    np.testing.assert_allclose(numbers(peaceful / ANSWERS), numbers(tmp_path / ANSWERS), atol=2e-6)


def test_two_processes_learn_what_one_learns(checkpoint, peaceful, tmp_path):
    run(tmp_path, checkpoint, *launcher(), OMP_NUM_THREADS="1")
    for path in (CURVE, ANSWERS):
        np.testing.assert_allclose(numbers(peaceful / path), numbers(tmp_path / path), atol=1e-4)
    record = json.loads((tmp_path / ANSWERS).with_suffix(".json").read_text())
    assert record["processes"] == 2
    assert not (tmp_path / ".resume" / SYSTEM).exists()
