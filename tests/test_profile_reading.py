"""Traces as they come: other programs', without a GPU, zipped, cut off, damaged."""

from __future__ import annotations

import gzip
import json

import pytest

from dsv3_train.errors import UserError
from traces import GEMM, SEND, analyze, event, kernel, parts, write


def test_an_xla_trace_is_read_by_the_names_of_its_threads(of):
    named = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 3, "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 4, "args": {"name": "XLA Ops"}},
    ]
    work = [{"ph": "X", "name": "gemm_fusion", "pid": 1, "tid": tid, "ts": 10, "dur": 5} for tid in (3, 4)]
    report = of(named + work)
    assert (report["kernels"], report["span_ms"]) == (1, 0.005)
    assert report["streams"][0]["stream"] == "Stream #13(Compute)"


def test_a_trace_without_a_gpu_is_analysed_by_its_operators_and_says_so(of):
    report = of(
        [
            event("cpu_op", "aten::linear", 0, 100, 1, 1),
            event("cpu_op", "aten::mm", 20, 60, 1, 1),
            event("cpu_op", "gloo:all_reduce", 150, 50, 2, 1),
            event("cpu_op", "aten::add", 180, 40, 1, 1),
        ]
    )
    assert (report["device"], report["kernels"], report["operators"]) == ("cpu", 0, 4)
    assert (report["compute_ms"], report["comm_ms"], report["exposed_comm_ms"]) == (0.14, 0.05, 0.03)
    assert "no GPU kernels in this trace" in report["notes"][0]
    # Of nested operators each counts for its own time.
    assert {row["class"]: row["ms"] for row in report["classes"]}["GEMM"] == pytest.approx(0.1)


def test_both_forms_zipped_or_not_give_the_same(tmp_path):
    events = [kernel(GEMM, 0, 100), kernel(SEND, 50, 100, 20)]
    texts = {"object.json": json.dumps({"traceEvents": events}), "array.json": json.dumps(events)}
    reports = []
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write(text)
        reports += [parts(analyze(tmp_path / name)), parts(analyze(tmp_path / f"{name}.gz"))]
    assert reports == reports[:1] * 4


def test_events_are_read_across_the_borders_of_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_train.profiling.json_events._CHUNK", 7)
    events = [kernel(f'{GEMM} é\\"{number}', number * 10, 5) for number in range(30)]
    report = analyze(write(tmp_path / "t.json", events, before={"a": [1, {"b": 2.5}]}, last=12))
    assert report["kernels"] == 30


BAD = {
    "empty": (b"", "the file is empty"),
    "blank": (b"  \n", "the file is empty"),
    "text": (b"hello\n", "not a trace: JSON begins with"),
    "binary": (bytes(range(256)), "not a trace: JSON begins with"),
    "other object": (b'{"schema": 1, "nodes": []}', "no list `traceEvents`"),
    "events no list": (b'{"traceEvents": 5}', "no list `traceEvents`"),
    "no events": (b'{"traceEvents": []}', "the trace has no events"),
    "empty array": (b"[]", "the trace has no events"),
    "events no objects": (b'{"traceEvents": [1, 2]}', "event 0 is no object"),
    "no GPU work": (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1, "dur": 2}]}', "no GPU work and no operators"),
    "no times": (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": "x"}]}', "without a usable ts or dur"),
    "bad JSON": (b'{"traceEvents": [{"ph": "X",, "cat": 1}]}', "not valid JSON at character"),
    "deep": (b"[" * 100_000, "deep"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_trace_is_told_in_one_line(tmp_path, what):
    content, told = BAD[what]
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as failure:
        analyze(path, "--out", tmp_path / "out")
    assert told in str(failure.value)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.5, 0.75, 0.999])
def test_a_trace_that_is_cut_off_is_refused(tmp_path, kept, zipped):
    events = [kernel(f"{GEMM}{number * 7919 % 1000}", number * 10, 5) for number in range(200)]
    whole = json.dumps({"traceEvents": events}).encode()
    whole = gzip.compress(whole) if zipped else whole
    path = tmp_path / ("t.json.gz" if zipped else "t.json")
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"t\.json.*: the trace is cut off after [\d,]+ events"):
        analyze(path)


def test_only_a_bare_array_may_lack_its_end(tmp_path):
    events = ",".join(json.dumps(kernel(GEMM, n, 1)) for n in range(3))
    (tmp_path / "array.json").write_text(f"[{events},\n")
    report = analyze(tmp_path / "array.json")
    assert report["kernels"] == 3
    assert "may have been cut off between two events" in report["notes"][0]
    (tmp_path / "object.json").write_text(f'{{"traceEvents": [{events},\n')
    with pytest.raises(UserError, match="cut off after 3 events"):
        analyze(tmp_path / "object.json")


def test_a_damaged_gzip_stream_is_told(tmp_path):
    whole = bytearray(
        gzip.compress(json.dumps([kernel(f"{GEMM}{n * 7919 % 1000}", n, 1) for n in range(500)]).encode())
    )
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "t.json.gz").write_bytes(whole)
    with pytest.raises(UserError, match=r"t\.json\.gz"):
        analyze(tmp_path / "t.json.gz")


def test_missing_files_and_directories_are_told(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            analyze(path)


def test_single_bad_events_are_left_out_and_counted(of):
    report = of(
        [
            kernel(GEMM, 0, 10),
            kernel(GEMM, None, 10),
            kernel(GEMM, 5, -3),
            kernel(GEMM, "NaN", 1),
            kernel(GEMM, 1e300, 1),
            kernel(GEMM, 1 << 52, 1),
            {**kernel("ProfilerStep#\u00b2", 0, 1), "cat": "user_annotation"},
            {**kernel("ProfilerStep#" + "9" * 30, 0, 1), "cat": "user_annotation"},
            {**kernel("launch", 0, 1, correlation="9" * 30), "cat": "cuda_runtime"},
            {"ph": "E", "pid": 0, "tid": 7, "ts": 3},
            {"ph": "X", "cat": ["kernel"], "name": {}, "pid": [], "tid": {}},
            {},
        ]
    )
    assert report["kernels"] == 1
    assert report["notes"] == [
        "6 events without a usable ts or dur were left out",
        "1 B or E events without their other half were left out",
    ]
