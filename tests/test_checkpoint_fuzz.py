"""The quick part of tools/fuzz_checkpoints.py, which says what is held."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_checkpoints


def test_nothing_broken_or_hostile_gets_through(tmp_path):
    came, wrong = fuzz_checkpoints.run(40, 1, tmp_path)
    assert not wrong
    assert came["directory harmless"] > 0
    assert came["checkpoint harmless"] > 0
    assert came["directory refused"] + came["checkpoint refused"] > 10


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """With checksums that are not looked at."""
    monkeypatch.setattr("dsv3_train.checkpoint.checksums.fault_of", lambda *_, **__: None)
    _, wrong = fuzz_checkpoints.run(20, 9, tmp_path, kinds=(fuzz_checkpoints.CHECKPOINT,))
    assert any("comes back otherwise" in one for one in wrong)
