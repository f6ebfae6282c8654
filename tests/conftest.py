"""Phantoms and checkpoints that are made once per test process, and one thread for each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers would oversubscribe the cores

import pytest
from support import load_script

from chest.core import parallel


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Keep `parallel_map` in this process: workers would keep the folder of the first test."""
    monkeypatch.setattr(parallel, "workers", lambda: 1)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Draw the three collections with a tenth of the patients; to be read only."""
    folder = tmp_path_factory.mktemp("drawn") / "phantom"
    load_script("data/draw_phantoms.py").main(folder, scale=0.1)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Make the tiny checkpoints; to be read only."""
    folder = tmp_path_factory.mktemp("made") / "checkpoints"
    load_script("data/make_checkpoints.py").main(folder)
    return folder
