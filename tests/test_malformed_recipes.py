"""Malformed recipes through the command: file, line, key and fix; exit code 2; no traceback; nothing written."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_cli import main

GOOD = (Path(__file__).parent / "recipes" / "tiny.yaml").read_text(encoding="utf-8")


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def without(section: str) -> str:
    kept, inside = [], False
    for line in GOOD.splitlines():
        inside = line.startswith(f"{section}:") or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    return "\n".join(kept)


# The recipe, what each line of the message begins with after `FILE:`, and what the lines say together.
CASES: dict[str, tuple[str | bytes, list[str], list[str]]] = {
    "unknown key": (
        changed("hidden_size: 64", "hiden_size: 64"),
        ["4: model.hiden_size: "],
        ["did you mean 'hidden_size'?"],
    ),
    "key of another section": (
        changed("  vocab_size: 128", "  vocab_size: 128\n  sequence_length: 32"),
        ["4: model.sequence_length: "],
        ["it belongs at training.sequence_length"],
    ),
    "key without its section": (
        f"{GOOD}micro_batch_size: 2\n",
        ["32: micro_batch_size: "],
        ["training.micro_batch_size"],
    ),
    "unknown section": (changed("training:", "trainer:"), ["27: trainer: "], ["did you mean 'training'?"]),
    "missing key": (
        changed("  sequence_length: 32\n", ""),
        ["27: training.sequence_length: "],
        ["missing; set an integer"],
    ),
    "missing section": (
        without("schedule"),
        [" schedule: "],
        ["missing; add the section with its keys (lr, batch_size"],
    ),
    "empty section": (changed("runtime:\n  device: cpu", "runtime:"), ["30: runtime: "], ["remove the line"]),
    "section that is a value": (changed("runtime:\n  device: cpu", "runtime: cpu"), ["30: runtime: "], ['got "cpu"']),
    "text for an integer": (
        changed("hidden_size: 64", "hidden_size: big"),
        ["4: model.hidden_size: "],
        ["must be an integer"],
    ),
    "quoted integer": (
        changed("hidden_size: 64", 'hidden_size: "64"'),
        ["4: model.hidden_size: "],
        ["remove the quotes"],
    ),
    "fraction for an integer": (
        changed("hidden_size: 64", "hidden_size: 64.5"),
        ["4: model.hidden_size: "],
        ["got 64.5"],
    ),
    "null": (changed("hidden_size: 64", "hidden_size:"), ["4: model.hidden_size: "], ["got null"]),
    "out of range": (
        changed("hidden_size: 64", "hidden_size: -64"),
        ["4: model.hidden_size: "],
        ["must be more than 0"],
    ),
    "not a choice": (
        changed("device: cpu", "device: gpu"),
        ["31: runtime.device: "],
        ["'auto', 'cpu', 'cuda'", "mean 'cpu'"],
    ),
    "yes": (f"{GOOD}parallel: {{zero1: yes}}\n", ["32: parallel.zero1: "], ["write true"]),
    "number for text": (f"{GOOD}description: 5\n", ["32: description: "], ["put it in quotes"]),
    "duplicate key": (f"{GOOD}name: again\n", ["32: name: "], ["given twice (first on line 1)"]),
    "schedule of a word": (
        changed("batch_size: 8", "batch_size: all"),
        ["25: schedule.batch_size: "],
        ["a number or a list of pieces"],
    ),
    "piece of two shapes": (
        changed("- {constant: 1e-3}", "- {constant: 1e-3, linear: [0, 1]}"),
        ["24: schedule.lr.1: "],
        ["one of constant: v"],
    ),
    "half a pair": (
        changed("linear: [0, 1e-3]", "linear: [0]"),
        ["23: schedule.lr.0.linear: "],
        ["two numbers, [from, to]"],
    ),
    "duration": (changed("100 steps", "100 stepz"), ["28: training.duration: "], ["write '2000 steps', or tokens"]),
    "layout": (f"{GOOD}pipeline: {{layout: Ettxt}}\n", ["32: pipeline.layout: "], ["'x'"]),
    "layout that would fill the memory": (
        f"{GOOD}pipeline: {{layout: Et*9999999999L}}\n",
        ["32: pipeline.layout: "],
        ["repeats"],
    ),
    "topology": (
        f"{GOOD}parallel:\n  world_size: 3\n  tensor: 2\n",
        ["33: parallel.world_size: "],
        ["set parallel.world_size to 2 or 4"],
    ),
    "several faults": (
        GOOD.replace("hidden_size: 64", "hiden_size: 64")
        .replace("batch_size: 8", "batch_size: all")
        .replace("cpu", "gpu"),
        ["4: model.hiden_size: ", "25: schedule.batch_size: ", "31: runtime.device: "],
        [],
    ),
    "variable that is not set": (
        changed("name: tiny", "name: ${env:DSV3_TEST_NOT}"),
        ["1: name: "],
        ["DSV3_TEST_NOT is not set"],
    ),
    "shell variable": (changed("name: tiny", "name: ${USER}"), ["1: name: "], ["${env:NAME}"]),
    "code": (
        changed("name: tiny", "name: !!python/object/apply:os.system ['touch pwned']"),
        ["1: name: "],
        ["tag !!python/object/apply:os.system is not allowed"],
    ),
    "code in a base": (
        "base: !!python/name:os.system\n" + GOOD,
        ["1: base: "],
        ["!!python/name:os.system is not allowed"],
    ),
    "alias bomb": (
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        ["2: not valid YAML: "],
        ["aliases (*a) are not allowed"],
    ),
    "alias of itself": ("a: &a [*a]", ["1: not valid YAML: "], ["aliases"]),
    "deep nesting": ("a: " + "[" * 50_000, ["1: not valid YAML: "], ["more than 20 levels"]),
    "many values": ("a: [" + "1," * 200_000 + "]", [" 400005 characters are too many"], []),
    "large file": ("#" * 2_000_000, [" 2000000 bytes are too many"], []),
    "tabs": (changed("  vocab_size", "\tvocab_size"), ["3: not valid YAML: "], ["indent with spaces, not tabs"]),
    "open bracket": (changed("[0, 1e-3]", "[0, 1e-3"), ["23: not valid YAML: "], ["expected ',' or ']'"]),
    "two colons": ("name: a: b\n", ["1: not valid YAML: "], ["in quotes"]),
    "two documents": (f"{GOOD}---\n{GOOD}", ["32: not valid YAML: "], ["single document"]),
    "control characters": (b"name: \x00\x01\n", ["1: not valid YAML: "], ["special characters"]),
    "not UTF-8": ("name: café\n".encode("latin-1"), [" not UTF-8 text"], ["save it as UTF-8"]),
    "UTF-16": (GOOD.encode("utf-16"), [" not UTF-8 text"], []),
    "empty": ("", [" empty; "], ["model, schedule and training"]),
    "comments only": ("# nothing\n", [" empty; "], []),
    "a list": ("- name: tiny\n", [" a recipe is a mapping"], ["not a list"]),
    "a word": ("tiny\n", [" a recipe is a mapping"], ["not a single value"]),
    "unknown base": (f"base: smokee\n{GOOD}", ["1: base: "], ["did you mean the shipped recipe 'smoke'?"]),
    "missing base": (f"base: ../gone.yaml\n{GOOD}", ["1: base: "], ["no such file"]),
    "base in a circle": (f"{GOOD}base: bad.yaml\n", ["32: base: "], ["circle: bad.yaml -> bad.yaml"]),
    "base that is a list": (f"{GOOD}base: [smoke]\n", ["32: base: "], ["the name or the path"]),
    "key that is a list": (f"{GOOD}? [a]\n: 1\n", ["32: a key must be a word"], []),
    "merge key": (f"{GOOD}<<: {{name: x}}\n", ["32: <<: unknown key"], []),
    "another variable in the run directory": (
        changed("device: cpu", "run_dir: runs/{nam}"),
        ["31: runtime.run_dir: "],
        ["only {name}"],
    ),
    "format in the run directory": (
        changed("device: cpu", "run_dir: 'runs/{name!r}'"),
        ["31: runtime.run_dir: "],
        ["only {name}"],
    ),
    "open brace in the run directory": (
        changed("device: cpu", "run_dir: 'runs/{name}}'"),
        ["31: runtime.run_dir: "],
        ["braces themselves are {{ and }}"],
    ),
    "unfit name": (changed("name: tiny", "name: a/b"), ["1: name: "], ["letters, digits"]),
}


@pytest.fixture
def show(monkeypatch, tmp_path, capsys):
    """Run `dsv3 recipes show ...` in an own directory; its exit code and lines on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSV3_TEST_NOT", raising=False)

    def run(*arguments: str) -> tuple[object, list[str]]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["dsv3", "recipes", "show", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.run()
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return stop.value.code, printed.err.splitlines()

    return run


@pytest.mark.parametrize("name", list(CASES))
def test_one_line_for_each_fault(show, tmp_path, name):
    content, places, words = CASES[name]
    (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    code, lines = show("bad.yaml")
    assert code == 2
    assert time.process_time() - start < 5
    for place in places:
        assert sum(line.startswith(f"bad.yaml:{place}") for line in lines) == 1, lines
    assert len(lines) == len(places)
    for word in words:
        assert word in "\n".join(lines)
    assert not any(
        jargon in "\n".join(lines) for jargon in ("pydantic", "https://", "validation error", "Input should")
    )


def test_thousands_of_faults_are_cut_short(show, tmp_path):
    (tmp_path / "bad.yaml").write_text("".join(f"k{n}: 1\n" for n in range(9_000)), encoding="utf-8")
    start = time.process_time()
    code, lines = show("bad.yaml")
    assert code == 2
    assert time.process_time() - start < 5
    assert len(lines) == 101
    assert any(line.endswith("more faults") for line in lines)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "smokee",
            "smokee: no shipped recipe of that name, and no such file; did you mean the shipped recipe 'smoke'?",
        ),
        (
            "nothing",
            "nothing: no shipped recipe of that name, and no such file; shipped recipes: dsv3_100m, dsv3_16b, ",
        ),
        ("gone.yaml", "gone.yaml: no such file; shipped recipes: "),
        ("folder", "folder: a directory; name a recipe's file in it"),
        ("./folder", "folder: a directory; name a recipe's file in it"),
        ("/dev/null", "/dev/null: not a file"),
        ("", "'': no shipped recipe"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_what_is_no_recipe(show, tmp_path, ref, message):
    (tmp_path / "folder").mkdir()
    code, lines = show(ref)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_the_fault_of_a_base_names_the_bases_file(show, tmp_path):
    (tmp_path / "below.yaml").write_text(GOOD.replace("hidden_size: 64", "hidden_size: big"), encoding="utf-8")
    (tmp_path / "top.yaml").write_text("base: below.yaml\ntraining: {seed: x}\n", encoding="utf-8")
    code, lines = show("top.yaml")
    assert code == 2
    assert [line.split(": ")[0] for line in lines] == ["below.yaml:4", "top.yaml:2"]


def test_the_fault_of_an_override_names_the_override(show, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    code, lines = show("good.yaml", "training.sed=1", "optim.eps=tiny")
    assert code == 2
    assert sorted(lines) == [
        "override 'optim.eps=tiny': optim.eps: must be a number, got \"tiny\"",
        "override 'training.sed=1': training.sed: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("name: !!python/object/apply:os.system ['touch pwned']\nbase: smoke\n", "bad.yaml:1: name: the tag "),
        ("base: smoke\ntraining: {seed: x}\n", "bad.yaml:2: training.seed: must be an integer"),
    ],
)
def test_the_installed_command(tmp_path, content, line):
    (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
    command = [sys.executable, "-m", "dsv3_cli.main", "recipes", "show", "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]
