"""A tiny checkpoint, and the stage's outputs when nothing goes wrong."""

import signal

import pytest
from case import SYSTEM, ZEROSHOT, write_case
from support import load_script, run_stage


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a SigLIP that is tinier than the phantoms', with 16 patches; to be read only."""
    folder = tmp_path_factory.mktemp("tinier")
    load_script("data/make_checkpoints.py").make_siglip(folder, side=32, patch=8)
    return folder


@pytest.fixture(scope="session")
def peaceful(checkpoint, tmp_path_factory):
    """Folder in which the stages ran uninterrupted in this process; to be read only."""
    folder = write_case(tmp_path_factory.mktemp("peaceful"), checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(SYSTEM)
        run_stage(ZEROSHOT)
    return folder


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Restore pytest's signal handlers: a stage sets its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
