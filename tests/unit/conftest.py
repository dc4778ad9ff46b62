"""Unit tests load no torch, so that all of them take seconds: `make unit`."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _loads_no_torch():
    """Within `make unit`; in a run of all tests, others may have loaded it before."""
    was_loaded = "torch" in sys.modules
    yield
    assert was_loaded or "torch" not in sys.modules, "a unit test loads torch: move it to tests/"
