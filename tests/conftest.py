"""Test helpers are importable from anywhere under tests/; fixtures that several files share."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))


@pytest.fixture(scope="module", autouse=True)
def rank_of_nobody():
    """What makes this process a rank does not outlast a file: the next one would join its world."""
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


@pytest.fixture
def of(tmp_path):
    """The report of one rank's events (test_profile_*.py)."""
    from traces import analyze, write

    return lambda events, **header: analyze(write(tmp_path / "trace.json", events, **header))
