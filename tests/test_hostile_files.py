"""Files of a run directory and tokenizers as others may have left them, chains of recipes, and the net under it all."""

from __future__ import annotations

import json
import os
import sys

import pytest

from dsv3_cli import main
from dsv3_train import regular
from dsv3_train.data.cutting import Cutter
from dsv3_train.data.tokenizer import Tokenizer, train
from dsv3_train.errors import UserError, on_one_line, printable
from dsv3_train.lines import newest_step
from dsv3_train.recipe.load import load
from dsv3_train.runtime import incidents
from dsv3_train.training import log, skips


class PanicException(BaseException):
    """What a panic in Rust is in Python: no Exception."""


GOOD = {"first": 8, "last": 15, "reason": "spike", "step": 2, "loss": 9.5}


@pytest.mark.parametrize(
    "line",
    [
        '{"first": 8, "last": 15, "reason": "spike", "step": 2, "loss": NaN}',
        *(
            json.dumps(GOOD | changed)
            for changed in (
                {"first": -1}, {"first": 1.5}, {"first": "8"}, {"first": True}, {"last": 7}, {"last": 10**30},
                {"reason": "\x1b[2J"}, {"reason": []}, {"step": None}, {"loss": "high"},
                {"loss": float("inf")}, {"x": 1},
            )
        ),
        "[" * 100_000,
        "8-15",
        "null",
    ],
)  # fmt: skip
def test_a_skip_that_is_none(tmp_path, line):
    path = tmp_path / skips.NAME
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"skips.jsonl:2: not a skip") as told:
        skips.read(tmp_path)
    assert len(str(told.value).splitlines()) == 1
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert skips.read(tmp_path) == [skips.Skip(**GOOD)]


def test_fifos_in_a_run_directory(tmp_path):
    """None is waited for."""
    for name in (skips.NAME, "incidents.jsonl", "log.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        skips.read(tmp_path)
    with pytest.raises((UserError, OSError)):
        log._Lines(tmp_path / "log.txt")
    incidents.record(tmp_path, "spike", text="x")
    assert incidents.read(tmp_path) == []


@pytest.mark.parametrize("step", ['"9"', "null", "true", "[]", "-1", "1e3", str(10**30)])
def test_a_line_without_a_step_belongs_to_no_checkpoint(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "step", "step": 2}}\n{{"kind": "step", "step": {step}}}\n', encoding="utf-8")
    assert newest_step(path) == 2
    log._drop_after(path, 2)
    assert path.read_text(encoding="utf-8") == '{"kind": "step", "step": 2}\n'


def test_a_tokenizer_that_panics(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train(["a cat and a dog"], 270))
    found = Tokenizer.load(path)

    class Panics:
        def encode(self, *_, **__):
            raise PanicException("called `Option::unwrap()` on a `None` value\nat \x1b")

        decode = encode

    monkeypatch.setattr(found, "_tokenizer", Panics())
    for asked in (lambda: found.encode("x"), lambda: found.decode([1])):
        with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json that works .*None. value.nat .x1b"):
            asked()


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"content": 5, "id": 0}]},
        {"added_tokens": [{"content": ["x"], "id": 0}]},
        {"added_tokens": None},
        {"added_tokens": [5]},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
        {"model": None},
    ],
)
def test_a_tokenizer_that_is_none(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(train([], 270)) | change), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: (not a tokenizer|a tokenizer without)"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Split", "pattern": ["a"], "behavior": "Isolated"},
        {"type": "ByteLevel", "pretokenizers": 5, "add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": 5},
        {"type": "Sequence", "pretokenizers": [["ByteLevel"]]},
        ["ByteLevel"],
    ],
)
def test_what_divides_text_otherwise_is_not_proven(step):
    assert not Cutter({"added_tokens": [], "pre_tokenizer": step}).proven


def test_recipes_on_top_of_each_other(tmp_path):
    (tmp_path / "r0.yaml").write_text("base: smoke\n", encoding="utf-8")
    for number in range(1, 1200):
        (tmp_path / f"r{number}.yaml").write_text(f"base: r{number - 1}.yaml\n", encoding="utf-8")
    assert load(str(tmp_path / "r18.yaml")).name == "r18"
    with pytest.raises(UserError, match="base: more than 20 recipes") as told:
        load(str(tmp_path / "r1199.yaml"))
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [RuntimeError, PanicException, MemoryError, RecursionError])
def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys, kind):
    def fails(**_):
        raise kind("a\x1b[2Jb\nc")

    monkeypatch.setattr(main, "app", fails)
    monkeypatch.delenv("DSV3_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.run()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert len(told.splitlines()) == 1
    assert "a\\x1b[2Jb\\nc" in told
    assert "DSV3_TRACEBACK=1" in told
    assert ("fault of dsv3" in told) == (kind is not MemoryError)
    monkeypatch.setenv("DSV3_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main.run()
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "\x1b" not in told


def test_names_that_are_too_long(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsv3", "data", "show", "x" * 5000])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_text_and_names_for_a_terminal():
    assert printable("a\tb\n\u200dc\x1b\u202e") == "a\tb\n\u200dc\\x1b\\u202e"
    assert on_one_line("a\tb\n\u200dc\x1b") == "a\\tb\\n\\u200dc\\x1b"


def test_what_is_read_whole_has_a_bound(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    assert regular.read(tmp_path / "x", 11) == bytes(11)
    with pytest.raises(UserError, match="more than 10 bytes"):
        regular.read(tmp_path / "x", 10)
