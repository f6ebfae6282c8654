"""Fixtures of the data layer's tests."""

import pytest
from drawn import COUNTS, draw_collections
from support import write_params


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the drawn collections and a params.yaml that fits them."""
    draw_collections(tmp_path / "data/raw/phantom")
    write_params(tmp_path, **{"phantom.expected_counts": COUNTS, "phantom.image_sizes": [16, 24]})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def raw(place):
    """The folder of the drawn collections."""
    return place / "data/raw/phantom"
