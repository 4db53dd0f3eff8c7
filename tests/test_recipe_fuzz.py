"""The quick part of tools/fuzz_recipes.py, which says what is held."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_recipes


def test_nothing_broken_or_hostile_gets_through(tmp_path):
    came, wrong = fuzz_recipes.run(120, 1, tmp_path)
    assert not wrong
    assert came["harmless"] == 24
    assert came["refused"] > 0
    assert came["accepted"] > 24


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch):
    """With a reader of skips that looks at nothing, and a tokenizer's library that panics."""

    class PanicException(BaseException):
        pass

    def panic(*_):
        raise PanicException("at src/lib.rs")

    monkeypatch.setattr(fuzz_recipes, "TARGETS", (fuzz_recipes.run_directory, fuzz_recipes.manifest_file))
    monkeypatch.setattr("dsv3_train.training.skips._checked", lambda line: fuzz_recipes.skips.Skip(**line))
    monkeypatch.setattr("dsv3_train.data.manifest.Manifest.model_validate_json", panic)
    _, wrong = fuzz_recipes.run(60, 1, tmp_path)
    assert any("is none" in one or "not supported" in one for one in wrong), wrong
    assert any("PanicException" in one for one in wrong), wrong
