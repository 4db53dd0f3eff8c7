"""The quick part of tools/fuzz_traces.py, which says what is held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_traces


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_broken_or_hostile_gets_through(tmp_path, seed):
    came, wrong = fuzz_traces.run(60, seed, tmp_path)
    assert not wrong
    assert came["harmless"] > 0
    assert came["refused"] > 0
    assert came["accepted"] > 0


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """With the next kernel of a stream not looked at, and with names shown as they are."""
    monkeypatch.setattr(
        "dsv3_train.profiling.gpus._without_overruns", lambda trace, kernels, at: (kernels["end"], (0, 0))
    )
    _, wrong = fuzz_traces.run(60, 1, tmp_path)
    assert any("figures" in one for one in wrong)
