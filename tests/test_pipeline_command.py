"""`dsv3 pipeline`: its examples run, JSON is one object, pictures are whole, bad arguments end in one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.pipeline.draw.html import html
from dsv3_train.pipeline.draw.panel import Panel
from dsv3_train.pipeline.draw.svg import svg
from dsv3_train.pipeline.draw.terminal import terminal
from dsv3_train.pipeline.durations import UNIT
from dsv3_train.pipeline.durations_input import durations_from
from dsv3_train.pipeline.generate import build
from dsv3_train.pipeline.operations import KINDS, Compute
from dsv3_train.pipeline.simulate import Run, Span, simulate

SVG = "{http://www.w3.org/2000/svg}"


def dsv3(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["pipeline", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def panel(kind: str, ranks: int = 4, micro_batches: int = 8, **options) -> Panel:
    schedule = build(kind, ranks, micro_batches, **options)
    return Panel(f"{kind} <{ranks} & {micro_batches}>", schedule, simulate(schedule, UNIT.of(schedule)))


@pytest.mark.parametrize("command", ["show", "compare", "ops"])
def test_the_example_of_the_help_runs(command):
    example = re.search(r"Example: dsv3 pipeline (.*)$", dsv3(command, "--help"), re.MULTILINE)
    assert example
    assert dsv3(*shlex.split(example[1].strip()))


def test_ops_as_json():
    report = json.loads(dsv3("ops", "dualpipe", "--ranks", "2", "--micro-batches", "4", "--json"))
    # The published class on two ranks: what it stores under 0 enters at rank 0, under 1 at rank 1.
    assert report == {
        "ranks": [
            ["F0.0", "F1.0", "F0.1", "B1.0", "F1.1&B0.0", "B1.1", "I0.1", "W0.1"],
            ["F1.0", "F0.0", "F1.1", "B0.0", "F0.1&B1.0", "B0.1", "I1.1", "W1.1"],
        ]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ops_names_every_operation_once(kind):
    lists = json.loads(dsv3("ops", kind, "--stages", "4", "--micro-batches", "5", "--json"))["ranks"]
    chunks = {"1f1b": 1, "zb1p": 1}.get(kind, 2)
    per_chunk = [3, 2] if kind == "dualpipe" else [5] * chunks
    for names in lists:
        ops = [op for name in names for op in name.split("&")]
        assert len(ops) == len(set(ops))
        forwards = {f"F{chunk}.{m}" for chunk in range(chunks) for m in range(per_chunk[chunk])}
        assert {op for op in ops if op[0] == "F"} == forwards
        assert {op[1:] for op in ops if op[0] in "BI"} == {op[1:] for op in forwards}


def test_compare_as_json():
    arguments = ("--ranks", "8", "--micro-batches", "16", "--durations", "F=1,I=1,W=1,FB=3")
    report = json.loads(dsv3("compare", *arguments, "--json"))
    by_name = {schedule["name"]: schedule for schedule in report["schedules"]}
    assert list(by_name) == list(KINDS)
    assert report["notes"] == {}
    # shared table of bubbles at F = I = W = 1: 7 (F + B) over 69, and so on
    assert {name: round(100 * one["bubble_fraction"], 1) for name, one in by_name.items()} == {
        "1f1b": 30.4,
        "interleaved": 17.9,
        "zb1p": 12.7,
        "zbv": 6.8,
        "dualpipe": 11.1,
        "dualpipev": 12.7,
    }
    assert by_name["dualpipe"]["parameter_copies"] == 2
    assert by_name["dualpipev"]["parameter_copies"] == 1
    assert by_name["dualpipev"]["peak_in_flight"] == 8.5
    assert by_name["dualpipe"]["closed"]["peak_in_flight"] == 9


def test_compare_leaves_out_what_is_impossible_and_says_so():
    report = json.loads(dsv3("compare", "--ranks", "5", "--micro-batches", "7", "--json"))
    assert [one["name"] for one in report["schedules"]] == [kind for kind in KINDS if kind != "dualpipe"]
    assert "even" in report["notes"]["dualpipe"]
    assert "no dualpipe" in dsv3("compare", "--ranks", "5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "dualpip"), "did you mean 'dualpipe'?"),
        (("show", "foo"), "there are 1f1b, interleaved"),
        (("show", "dualpipe", "--stages", "7"), "must be even, not 7"),
        (("ops", "1f1b", "--micro-batches", "0"), "--micro-batches must be at least 1"),
        (("compare", "--ranks", "-1"), "--ranks must be at least 1"),
        (("ops", "interleaved", "--virtual", "1"), "--virtual must be at least 2"),
        (("ops", "dualpipe", "--pairs"), "interleaved schedule alone"),
        (("compare", "--durations", "F=1,X=2"), "unknown key 'X'"),
        (("compare", "--durations", "F=1,F=2"), "F is given twice"),
        (("compare", "--durations", "F=one"), "positive number, not 'one'"),
        (("compare", "--durations", "F=nan"), "positive number"),
        (("compare", "--durations", "I=1,W=1"), "F is missing"),
        (("compare", "--durations", "F=1,B=1,I=2"), "leaves nothing for W"),
        (("compare", "--durations", "nowhere.json"), "cannot read nowhere.json"),
        (("compare", "--latency", "-1"), "--latency must be"),
        (("compare", "--head", "nan"), "--head must be"),
        (("show", "1f1b", "--svg", "setup.py/a.svg"), "cannot write"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(UserError) as refused:
        dsv3(*arguments)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ('{"F": 1, "per": "chunk"}', 'per must be "rank" or "stage"'),
        ('{"F": 1, "stages": {"last": {"F": 2}}}', "'last' is no stage's number"),
        ('{"F": 1, "stages": [1]}', "stages must be an object"),
        ('{"F": 1, "stages": {"0": {"F": true}}}', "stage 0: F must be a positive number"),
        ('{"F": 1, "FB": 0}', "durations.json: FB must be a positive number, not 0"),
        ('{"F": 1, "stages": {"0": {"FB": -1}}}', "durations.json: stage 0: FB must be a positive number, not -1"),
        ('{"F": 1' + 400 * "0" + "}", "F must be a positive number, not 10000"),
        ('{"F": 1' + 300 * "0" + "}", "F must be a positive number, not 10000"),
        ('{"F": 1, "stages": {"' + 5000 * "1" + '": {"F": 2}}}', "is no stage's number"),
        (100000 * '{"F":', "nested too deeply"),
        ('{"F": 1, "stages": {"8": {"F": 2}}}', "stage 8 is none of dualpipe's 8 stages"),
    ],
)
def test_bad_files_of_durations(tmp_path, content, said):
    file = tmp_path / "durations.json"
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        dsv3("show", "dualpipe", "--stages", "8", "--durations", str(file))
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_bad_input_exits_with_2_and_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dsv3_cli.main", "pipeline", "show", "dualpipe", "--stages", "7"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_missing_durations_follow_from_the_others(tmp_path):
    assert durations_from("F=2") == durations_from("F=2,I=2,W=2")
    halves = durations_from("F=1,B=3")
    assert (halves.I, halves.W, halves.whole) == (1.5, 1.5, 3)
    assert durations_from("F=1, B=3, W=1").I == 2
    file = tmp_path / "measured.json"
    file.write_text('{"F": 1, "I": 1, "W": 1, "FB": 2.5, "per": "stage", "stages": {"3": {"F": 2}}}')
    measured = durations_from(str(file))
    assert measured.per_stage
    assert measured.stages == {3: {"F": 2}}
    assert dsv3("show", "dualpipe", "--stages", "4", "--durations", str(file))
    with pytest.raises(UserError, match="one schedule alone"):
        dsv3("compare", "--ranks", "4", "--durations", str(file))


@pytest.mark.parametrize("kind", KINDS)
def test_svg_shows_every_operation(kind):
    drawn = panel(kind, pairs=kind == "interleaved")
    tree = ElementTree.fromstring(svg([drawn]))
    cells = [group for group in tree.iter(f"{SVG}g") if group.get("class") == "op"]
    events = [event for rank in drawn.schedule.events for event in rank if isinstance(event, Compute)]
    assert len(cells) == len(events)
    assert sum(len(cell.findall(f"{SVG}rect")) for cell in cells) == sum(len(event.ops) for event in events)
    first = cells[0].find(f"{SVG}title").text
    assert first.startswith("rank 0: F0.0\nforward of micro-batch 0, stage 0")
    texts = {text.text for text in tree.iter(f"{SVG}text")}
    assert drawn.title in texts
    assert f"{drawn.run.bubbles[0]:.1%}" in texts
    width = float(tree.get("width"))
    right = max(float(rect.get("x")) + float(rect.get("width")) for cell in cells for rect in cell.iter(f"{SVG}rect"))
    assert right <= width


def test_measured_timelines_are_drawn_beside_simulated_ones():
    simulated = panel("dualpipev")
    later = tuple(
        tuple(Span(100 + 3 * span.start, 100 + 3 * span.end, span.ops) for span in spans)
        for spans in simulated.run.timeline
    )
    measured = Panel("measured", simulated.schedule, Run(later), "ms")
    assert measured.run.bubble_fraction == pytest.approx(simulated.run.bubble_fraction)
    page = html([simulated, measured])
    assert page.count('class="title"') == 2
    assert "src=" not in page  # nothing loaded
    assert "<script" not in page
    assert page.count("<tr>") == 2 * (1 + 4)
    tree = ElementTree.fromstring(svg([simulated, measured]))
    left = min(float(rect.get("x")) for g in tree.iter(f"{SVG}g") for rect in g.iter(f"{SVG}rect"))
    assert left == 64  # both begin at the left edge


def test_pictures_are_written_whole(tmp_path):
    target = tmp_path / "a.svg"
    page = tmp_path / "a.html"
    dsv3("show", "zbv", "--stages", "4", "--micro-batches", "8", "--svg", str(target), "--html", str(page))
    assert ElementTree.parse(target).getroot().tag == f"{SVG}svg"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.svg"]


@pytest.mark.parametrize("colours", [None, "truecolor"])
@pytest.mark.parametrize("width", [80, 132])
def test_terminal_picture_fits(width, colours):
    for kind, ranks, micro_batches in (("dualpipe", 8, 20), ("zbv", 4, 8), ("1f1b", 16, 64), ("1f1b", 102, 2)):
        drawn = panel(kind, ranks, micro_batches)
        console = Console(width=width, color_system=colours, force_terminal=bool(colours), no_color=not colours)
        with console.capture() as captured:
            console.print(terminal(drawn, console))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
        rows = [line for line in plain.splitlines() if re.match(r" *\d+ ", line) and line.rstrip()[-1].isdigit()]
        assert len(rows) == ranks
        assert all(len(line) <= width for line in plain.splitlines())
        assert f"{drawn.run.bubbles[0]:.1%}" in rows[0]


def test_terminal_without_colours_draws_letters():
    drawn = panel("dualpipe", 2, 4)
    console = Console(width=80, color_system=None, no_color=True)
    with console.capture() as captured:
        console.print(terminal(drawn, console))
    # F0 F1 F0 B1 (2) F1&B0 (3) B1 (2) I0 W0, three columns per unit of time
    row = next(line for line in captured.get().splitlines() if line.startswith(" 0 "))
    assert row.split()[1] == "FFFfffFFF" + "bbbbbb" + "x" * 9 + "bbbbbb" + "III" + "WWW"


def test_schedules_import_no_torch(tmp_path):
    code = (
        "import sys, dsv3_cli.main, dsv3_train.pipeline.compare, dsv3_train.pipeline.check, "
        "dsv3_train.pipeline.draw.html, dsv3_train.pipeline.draw.terminal\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
