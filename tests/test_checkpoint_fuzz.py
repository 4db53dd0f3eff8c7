"""The quick part of tools/fuzz_checkpoints.py, which says what is held."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_checkpoints

from dsv3_train.checkpoint.hf import sides


def test_nothing_broken_or_hostile_gets_through(tmp_path):
    came, wrong = fuzz_checkpoints.run(30, 1, tmp_path)
    assert not wrong
    assert came["directory harmless"] > 0
    assert came["checkpoint harmless"] > 0
    assert came["directory refused"] + came["checkpoint refused"] > 5


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """With other values than the files have."""
    monkeypatch.setattr(sides, "_finite", lambda values, _: values * 2)
    _, wrong = fuzz_checkpoints.run(8, 1, tmp_path, kinds=(fuzz_checkpoints.DIRECTORY,))
    assert any("comes back otherwise" in one for one in wrong)
