"""`dsv3 numerics` as a user runs it: examples of its help, files, JSON, bad input."""

from __future__ import annotations

import json
import re
import shlex
import struct
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from numeric_runs import falling, run_dir, steps
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_cli.numerics import _repeated
from dsv3_train.errors import UserError
from dsv3_train.numerics.picture import extremes


def dsv3(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["numerics", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """What the examples of the help name."""
    monkeypatch.chdir(tmp_path)
    for name, factor, override in (
        ("bf16", 1, "name=a"),
        ("fp8", 1.001, "precision.fp8=emulated"),
        ("bf16-2", 1.01, "training.seed=2"),
        ("bf16-3", 0.99, "training.seed=3"),
    ):
        run_dir(tmp_path / "runs" / name, steps(falling() * factor), override)
    return tmp_path


class _Loaded(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and not value.startswith(("#", "data:")):
                self.found.append(value)


def page_and_picture(directory, name: str) -> str:
    """Both are whole: nothing to load, light and dark, a PNG of some size."""
    text = (directory / f"{name}.html").read_text()
    page = _Loaded(text)
    assert not page.found
    assert "script" not in page.tags
    assert page.tags.count("svg") == 1
    assert "url(http" not in text
    assert "@import" not in text
    assert "light-dark(" in text
    assert "#1f2328" not in text[text.index("<svg") : text.index("</svg>")]
    png = (directory / f"{name}.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", png[16:24])) > 400
    assert sorted(path.name for path in directory.iterdir()) == [f"{name}.{kind}" for kind in ("html", "json", "png")]
    return text


def test_the_example_of_compare_runs_and_leaves_its_files(runs):
    example = re.search(r"Example: dsv3 numerics (.*?--out report)", " ".join(dsv3("compare", "--help").split()))
    assert example
    shown = dsv3(*shlex.split(example[1]))
    assert "fp8: within 0.25%: at most 0.10%" in shown
    assert "3 seeds of bf16: at most 1.00% from it" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()[:8])  # the table
    text = page_and_picture(runs / "report", "report")
    assert "fp8: within 0.25%: at most 0.10%" in text
    assert json.loads((runs / "report" / "report.json").read_text())["spread"]["seeds"] == 3


def test_the_example_of_formats_runs(tmp_path):
    example = re.search(r"Example: dsv3 numerics (.*)$", dsv3("formats", "--help"), re.MULTILINE)
    assert example
    assert "128x128" in dsv3(*shlex.split(example[1].strip(" │")), "--out", str(tmp_path / "out"))
    page_and_picture(tmp_path / "out", "formats")


def test_json_is_all_that_is_printed(runs):
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_cli.main", "numerics", "compare", "runs/bf16", "runs/fp8", "--json", "--out", "o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report == json.loads((runs / "o" / "report.json").read_text())
    assert report["runs"][0]["within_bound"] is True
    assert report["bound"] == 0.0025


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["compare", "runs/bf16", "runs/none"], "runs/none: no run of `dsv3 train`"),
        (["compare", "runs/bf16"], "nothing to compare with"),
        (
            ["compare", "runs/bf16", "runs/bf16-2"],
            "training.seed is 2, and 1234 in runs/bf16; give it, or the baseline of its seed, with --seeds",
        ),
        (["compare", "runs/bf16", "runs/fp8", "--bound", "many"], "--bound: 'many' is no bound"),
        (["compare", "runs/bf16", "runs/fp8", "--bound", "nan"], "--bound: 'nan' is no bound"),
        (["compare", "runs/bf16", "runs/fp8", "--window", "30"], "--window: 30 steps"),
        (["compare", "runs/bf16", "runs/fp8", "--out", "runs/bf16/recipe.yaml/x"], "cannot write"),
        (["run", "smoke", "--variants", "fp9"], "--variants: 'fp9' is no precision.fp8; there are none, blockwise"),
        (["run", "smoke", "--variants", "none", "--seeds", "1"], "nothing to compare with the baseline"),
        (["run", "smok"], "smok"),
    ],
)
def test_bad_input_ends_in_one_line(runs, arguments, why):
    with pytest.raises(UserError) as caught:
        dsv3(*arguments)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounds_and_other_seeds_alone(runs):
    assert "misses 0.05% by 0.050 points" in dsv3("compare", "runs/bf16", "runs/fp8", "--bound", "0.0005")
    assert "2 seeds of bf16" in dsv3("compare", "runs/bf16", "--seeds", "runs/bf16-2", "--out", "alone")
    page_and_picture(runs / "alone", "report")


def test_long_curves_keep_their_peaks():
    y_n = np.random.default_rng(0).normal(size=50_000)
    y_n[:100] = np.nan
    y_n[[31_415, 27_182]] = 9, -9
    at = extremes(y_n)
    assert {31_415, 27_182} <= set(at.tolist())
    assert len(at) <= 2000
    assert (np.diff(at) > 0).all()
    assert at[-1] >= 49_950
    assert extremes(y_n[:2000]).tolist() == list(range(2000))


@pytest.mark.parametrize(
    ("option", "words", "expected"),
    [
        ("--seeds", "a b --seeds c d --json", "a b --seeds c --seeds d --json"),
        ("--seeds", "a --seeds c --out d e", "a --seeds c --out d e"),
        ("--variants", "smoke --variants none emulated t.d=4", "smoke --variants none --variants emulated t.d=4"),
        ("--variants", "--variants fp8=a b+x=y t.d=4 z", "--variants fp8=a --variants b+x=y t.d=4 z"),
    ],
)  # fmt: skip
def test_options_that_take_several_words(option, words, expected):
    assert list(_repeated(option, words.split())) == expected.split()
