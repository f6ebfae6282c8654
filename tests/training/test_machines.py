"""The same training on other processors, with other threads, and in two processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from case import SYSTEM, ZEROSHOT, write_case
from processes import forked, run_in_two_processes
from support import ROOT, run_in

CURVE, ANSWERS = Path(f"data/training/{SYSTEM}.csv"), Path(f"data/predictions/{SYSTEM}.csv")
# Stands in for a processor without AVX: other kernels, other orders of summation.
OTHER_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
STAGES = f"from support import run_stage; run_stage('{SYSTEM}'); run_stage('{ZEROSHOT}')"


def numbers(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).select_dtypes("number")


def test_other_kernels_and_threads_give_the_same_curve_and_answers(checkpoint, peaceful, tmp_path):
    write_case(tmp_path, checkpoint)
    env = OTHER_KERNELS | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    run_in(tmp_path, sys.executable, "-c", STAGES, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", **env)
    assert (tmp_path / CURVE).read_bytes() == (peaceful / CURVE).read_bytes()
    for answers in (ANSWERS, Path(f"data/predictions/{ZEROSHOT}.csv")):
        here, there = (pd.read_csv(folder / answers) for folder in (peaceful, tmp_path))
        assert here["predicted"].equals(there["predicted"])
        np.testing.assert_allclose(
            numbers(peaceful / answers), numbers(tmp_path / answers), atol=2e-6
        )


@forked
def test_two_processes_learn_what_one_learns(checkpoint, peaceful, tmp_path, monkeypatch):
    monkeypatch.chdir(write_case(tmp_path, checkpoint))
    run_in_two_processes(SYSTEM)
    for path in (CURVE, ANSWERS):
        np.testing.assert_allclose(numbers(peaceful / path), numbers(path), atol=1e-4)
    assert json.loads(ANSWERS.with_suffix(".json").read_text())["processes"] == 2
    assert not Path(".resume", SYSTEM).exists()
