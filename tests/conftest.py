"""What is made once for all tests: phantoms and checkpoints."""

import pytest
from support import load_script


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """The three collections, drawn with a tenth of the patients; to be read only."""
    folder = tmp_path_factory.mktemp("drawn") / "phantom"
    load_script("data/draw_phantoms.py").main(folder, scale=0.1)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The tiny checkpoints, siglip and qwen; to be read only."""
    folder = tmp_path_factory.mktemp("made") / "checkpoints"
    load_script("data/make_checkpoints.py").main(folder)
    return folder


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: another worker does all others meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")
