"""Traces and reports that are broken or hostile: one line, no traceback, bounded memory, nothing a terminal obeys."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.profiling.classes import table
from dsv3_train.profiling.compare import compare, load
from dsv3_train.profiling.page import page
from dsv3_train.profiling.report import as_json, report
from dsv3_train.profiling.trace import read
from dsv3_train.profiling.values import integer
from dsv3_train.profiling.work import works
from traces import GEMM, SEND, analyze, dsv3, event, kernel, write

OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\u2066\x9b31m\ud800 [red]x[/red] [/] $\\frac{$ <script>alert(1)</script>"


def evil_trace(path):
    events = [
        {"ph": "M", "name": "process_name", "pid": EVIL, "args": {"name": EVIL}},
        event("kernel", EVIL, 0, 100, EVIL, EVIL, device=0, stream=EVIL),
        event("kernel", SEND, 50, 100, 20, EVIL, device=0, stream=EVIL + "2", **{"Collective name": EVIL}),
        event("kernel", GEMM, 300, 100, EVIL, EVIL, device=0, stream=EVIL),
        event("user_annotation", EVIL, 0, 1000, 1, 1),
        event("cpu_op", EVIL, 150, 200, 1, 1),
    ]
    return write(path, events)


def test_nothing_of_a_trace_is_obeyed_by_a_terminal_or_a_page(tmp_path):
    path = evil_trace(tmp_path / "t.json")
    rules = tmp_path / "rules.yaml"
    rules.write_text(json.dumps([{"class": EVIL, "kind": "compute", "match": "owned"}]).replace("\\ud800", ""))
    for more in ([], ["--classes", rules]):
        shown = dsv3("analyze", path, *more, "--out", tmp_path / "out")
        assert not OBEYED.search(shown)
        assert "\\x1b]0;owned\\x07" in shown.replace("\n", "")
        page = (tmp_path / "out" / "report.html").read_text()
        assert not OBEYED.search(page)
        assert "<script>alert" not in page
        assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
        assert not OBEYED.search(dsv3("compare", tmp_path / "out", tmp_path / "out"))
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    figures["classes"][0]["class"] = EVIL
    (tmp_path / "evil.json").write_text(json.dumps(figures))
    assert not OBEYED.search(dsv3("compare", tmp_path / "evil.json", tmp_path / "out"))


def test_plain_keeps_what_is_text():
    for text in ("ncclDevKernel_AllReduce<4096ul>", "gemm é 中文", "back\\slash"):
        assert on_one_line(text) == text
    assert on_one_line("a\x1b[2J\nb\u202e\ud800") == "a\\x1b[2J\\nb\\u202e\\ud800"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), ("3", 3), ("3.0", 3), ("3.5", -1), ("1e999999999", -1), ("NaN", -1), (1 << 70, -1), (None, -1), ([], -1)],
)
def test_integers_of_a_trace(value, expected):
    assert integer(value) == expected


DEEP = json.loads("[" * 300 + "]" * 300)
ODD = {
    "a stream of nested lists": kernel(GEMM, 0, 10, DEEP),
    "a category with a blank": {**kernel(GEMM, 0, 10), "cat": "kernel , more"},
    "a time beyond decimals": kernel(GEMM, "1e999999999", 10),
    "a time before them": kernel(GEMM, "1e-999999999", 10),
    "a time that is no number": kernel(GEMM, "sNaN", 10),
    "a duration of months": kernel(GEMM, 0, 1e16),
    "a collective of nested lists": kernel(GEMM, 0, 10, **{"Collective name": DEEP, "Process Group Name": DEEP}),
    "a name of nested lists": {**kernel(GEMM, 0, 10), "name": DEEP},
    "a process of nested lists": {**kernel(GEMM, 0, 10), "pid": DEEP, "tid": DEEP},
    "shapes of nested lists": event("cpu_op", "aten::mm", 0, 1, 1, 1, **{"Input Dims": DEEP, "External id": 1}),
    "shapes beyond floats": event(
        "cpu_op", "aten::mm", 0, 1, 1, 1, **{"Input Dims": [[1 << 62] * 90] * 2, "External id": 1}
    ),
    "shapes of objects": event("cpu_op", "aten::mm", 0, 1, 1, 1, **{"Input Dims": {"0": 1}}),
    "a label of nested lists": {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": DEEP}},
    "a begin of nested lists": {"ph": "B", "name": DEEP, "cat": DEEP, "pid": DEEP, "tid": DEEP, "args": DEEP},
    "an end of nested lists": {"ph": "E", "name": DEEP, "pid": DEEP, "tid": DEEP, "args": DEEP},
    "a phase of nested lists": {"ph": DEEP},
    "arguments of a list": {**kernel(GEMM, 0, 10), "args": DEEP},
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_an_odd_event_costs_no_other(tmp_path, what):
    (tmp_path / "t.json").write_text(
        json.dumps([kernel(GEMM, 0, 100, correlation=1, **{"External id": 1}), ODD[what], kernel(GEMM, 200, 100)])
    )
    found = works([read(tmp_path / "t.json")], table())
    figures = report(found)
    assert as_json(figures)
    assert page(found, figures)
    ranks = figures.get("ranks", [figures])
    assert sum(rank["kernels"] for rank in ranks) in (2, 3)
    assert ranks[0]["compute_ms"] == pytest.approx(0.2)


def test_a_number_of_too_many_digits_is_no_traceback(tmp_path):
    for text in ('{"traceEvents": [{"ph": "X", "ts": %s}]}', '{"x": %s, "traceEvents": []}', "[%s"):
        (tmp_path / "t.json").write_text(text % ("1" * 5000))
        with pytest.raises(UserError, match="too many digits"):
            analyze(tmp_path / "t.json")


def test_a_rank_that_is_no_rank_is_none(of):
    for rank in (1e400, -1, True, "3", DEEP, 10**4000):
        assert of([kernel(GEMM, 0, 10)], distributedInfo={"rank": rank})["rank"] == 0


@pytest.mark.parametrize("zipped", [False, True])
def test_two_traces_in_one_file_are_not_taken_for_the_first(tmp_path, zipped):
    whole = json.dumps({"traceEvents": [kernel(GEMM, 0, 10)]}).encode()
    for text in (whole + whole, whole + b"\n" + whole, json.dumps([kernel(GEMM, 0, 10)]).encode() * 2):
        (tmp_path / "t.json").write_bytes(gzip.compress(text) if zipped else text)
        with pytest.raises(UserError, match=r"more text after the trace's end, at character \d+"):
            analyze(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(whole + b" \n\n")
    assert analyze(tmp_path / "t.json")["kernels"] == 1


def test_a_fifo_or_a_device_is_no_trace(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(UserError, match=r"not a regular file \(a FIFO, a device"):
            analyze(path)
        with pytest.raises(UserError, match="not a regular file"):
            dsv3("compare", path, path)
        with pytest.raises(UserError, match="not a regular file"):
            analyze(write(tmp_path / "t.json", [kernel(GEMM, 0, 10)]), "--classes", path)


def test_a_trace_that_gzip_blows_up_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.profiling.json_events._EXPANDED", 1 << 22)
    text = json.dumps([kernel(GEMM, 0, 10)])
    for bomb in (" " * (6 << 20) + text, "[" + " " * (6 << 20) + text[1:]):
        (tmp_path / "t.json").write_bytes(gzip.compress(bomb.encode()))
        with pytest.raises(UserError, match="more than 250 times its size"):
            analyze(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(" " * (6 << 20) + text)
    assert analyze(tmp_path / "t.json")["kernels"] == 1


def test_open_events_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.profiling.trace._MOST_OPEN", 100)
    begin = {"ph": "B", "pid": 0, "tid": 7, "cat": "kernel", "name": GEMM, "ts": 0}
    with pytest.raises(UserError, match="more than 100 events are open at once"):
        analyze(write(tmp_path / "t.json", [kernel(GEMM, 0, 10), *[begin] * 101]))
    pairs = [{**begin, "ph": phase, "ts": 10 * n + (phase == "E")} for n in range(300) for phase in "BE"]
    assert analyze(write(tmp_path / "t.json", pairs))["kernels"] == 300


def test_what_is_kept_of_a_trace_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.profiling.trace._MOST_BYTES", 1 << 22)
    path = write(tmp_path / "t.json", [kernel(GEMM, n, 1) for n in range(70_000)])
    with pytest.raises(UserError, match="the trace is too large: its first 65,536 events take more than"):
        read(path)


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([kernel(GEMM, n, 1, stream=n) for n in range(30)], "kernels on 30 streams; at most 20"),
        ([event("kernel", GEMM, n, 1, 7, n) for n in range(30)], "work of 30 GPUs in one trace; at most 20"),
        ([event("cpu_op", "aten::mm", n, 1, 7, n) for n in range(30)], "work of 30 processes in one trace; at most 20"),
    ],
)
def test_streams_and_gpus_are_bounded(tmp_path, monkeypatch, events, told):
    monkeypatch.setattr("dsv3_train.profiling.gpus._MOST", 20)
    monkeypatch.setattr("dsv3_train.profiling.gpus._MOST_STREAMS", 20)
    with pytest.raises(UserError, match=told):
        analyze(write(tmp_path / "t.json", events))


def test_ranges_and_steps_within_each_other_are_not_multiplied(tmp_path):
    """Each of these holds all kernels: their product is 16 million; and steps are bounded."""
    count = 4000
    events = [kernel(GEMM, n, 1) for n in range(count)]
    events += [event("user_annotation", "all", 0, count, 1, 1) for n in range(count)]
    events += [event("user_annotation", f"ProfilerStep#{n}", 0, count, 1, 1) for n in range(count)]
    (work,) = works([read(write(tmp_path / "t.json", events))], table())
    figures = report([work])
    (everything,) = figures["ranges"]
    assert (everything["count"], everything["kernels"], everything["compute_ms"]) == (count, count, count / 1e3)
    assert len(figures["steps"]) == 1000
    assert "3,000 more steps were left out" in figures["notes"]


def broken_reports(whole):
    """What -> a report.json."""
    step = whole["steps"][0]
    yield "a list", []
    yield "a number", 5
    yield "of no format", {"format": 2}
    yield "without ranks", {"format": 1, "ranks": []}
    yield "with ranks of numbers", {"format": 1, "ranks": [1]}
    for key in ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "idle_ms", "steps", "classes", "idle"):
        yield f"without {key}", {name: value for name, value in whole.items() if name != key}
        for wrong in (None, "1", -1.0, float("nan"), float("inf"), 1e300, True, [1], {"a": 1}, 10**400):
            yield f"{key} = {str(wrong)[:9]}", {**whole, key: wrong}
    yield "with a step of text", {**whole, "steps": ["1"]}
    yield "with a step that lacks its span", {**whole, "steps": [{k: v for k, v in step.items() if k != "span_ms"}]}
    yield "with a step that does not add up", {**whole, "steps": [{**step, "idle_ms": step["idle_ms"] + 1}]}
    yield "that does not add up", {**whole, "compute_ms": whole["compute_ms"] * 2}
    yield "with more exposed than there is", {**whole, "comm_ms": whole["exposed_comm_ms"] / 2}
    for row in (
        {},
        1,
        {"class": 1, "kind": "compute", "ms": 1},
        {"class": "a", "kind": "x", "ms": 1},
        {"class": "a", "kind": "compute", "ms": "1"},
    ):
        yield f"with a class {row}", {**whole, "classes": [row]}
    yield "host-bound by text", {**whole, "idle": {"host_bound_ms": "1"}}


def test_a_report_that_is_damaged_is_told_in_one_line(tmp_path):
    events = [
        event("user_annotation", "ProfilerStep#1", 0, 1000, 1, 1),
        kernel(GEMM, 0, 500),
        kernel(SEND, 400, 300, 20),
    ]
    dsv3("analyze", write(tmp_path / "t.json", events), "--out", tmp_path)
    whole = json.loads((tmp_path / "report.json").read_text())
    bad = tmp_path / "bad.json"
    cases = [(what, json.dumps(content)) for what, content in broken_reports(whole)]
    cases += [("nested", "[" * 100_000), ("not UTF-8", "\x80"), ("of many digits", "1" * 5000), ("empty", "")]
    for what, content in cases:
        bad.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=r"bad\.json: ") as failure:
            load(bad)
        assert "\n" not in str(failure.value), what
    for order in (list(whole), sorted(whole)):  # what is whole is taken, in any order
        bad.write_text(json.dumps({key: whole[key] for key in order}, indent=3))
        assert compare(load(bad), load(tmp_path))["span_ms"]["difference"] == 0


def test_a_report_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.profiling.compare._MOST_BYTES", 1000)
    (tmp_path / "report.json").write_text(" " * 2000)
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        load(tmp_path)
