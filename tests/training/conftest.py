"""A tiny checkpoint, and the stage's outputs when nothing goes wrong."""

import signal

import pytest
from case import SYSTEM, write_case
from support import run_stage


@pytest.fixture(scope="session")
def checkpoint(checkpoints):
    """Folder of the tiny SigLIP; to be read only."""
    return checkpoints / "siglip"


@pytest.fixture(scope="session")
def peaceful(checkpoint, tmp_path_factory):
    """Folder in which the stage ran uninterrupted in this process; to be read only."""
    folder = write_case(tmp_path_factory.mktemp("peaceful"), checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(SYSTEM)
    return folder


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Restore pytest's signal handlers: a stage sets its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
