"""Stages in forked processes, which need not import PyTorch again."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from support import run_stage

forked = pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process has no GPU")


def run_in_two_processes(stage: str) -> None:
    """Run a stage in two processes that share the work, as ``accelerate launch`` does."""
    debug_launcher(_run_anew, (stage,), num_processes=2)


def _run_anew(stage: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    run_stage(stage)


def exit_code(function: Callable[[], None]) -> int:
    """Return the exit code of a process that runs `function`; minus a signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode
