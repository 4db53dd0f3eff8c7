"""What `dsv3 profile` writes: report, page, picture, comparison."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from dsv3_train.errors import UserError
from dsv3_train.profiling.classes import table
from traces import GEMM, SEND, analyze, dsv3, event, kernel, write


def test_out_holds_report_page_and_picture(tmp_path):
    events = [kernel(GEMM, n * 10, 8) for n in range(2000)] + [kernel(SEND, n * 40, 5, 20) for n in range(500)]
    path = write(tmp_path / "t.json", [*events, kernel("</script><b>", 20000, 5)])
    text = dsv3("analyze", path, "--out", tmp_path / "out")
    assert "hidden" in text
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "report.json", "report.png"]
    assert json.loads((out / "report.json").read_text()) == analyze(path)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    embedded = page.split('type="application/json">')[1].split("</script>")[0]
    assert "<" not in embedded
    data = json.loads(embedded)
    assert sum(len(stream["start"]) for stream in data[0]["streams"]) == 2501


def test_a_page_of_many_kernels_merges_the_small_ones_and_loses_none(tmp_path):
    from dsv3_train.profiling.boxes import boxes
    from dsv3_train.profiling.trace import read
    from dsv3_train.profiling.work import works

    events = [kernel(GEMM, n * 10 + n // 100 * 700, 8 if (n + 1) % 100 else 700) for n in range(20_000)]
    (work,) = works([read(write(tmp_path / "t.json", events))], table())
    drawn = boxes(work, most=2000)
    (stream,) = drawn["streams"]
    assert len(stream["start"]) <= 2000
    assert sum(stream["count"]) == 20_000
    assert sum(stream["busy"]) == int((work.end - work.start).sum())
    alone = [length for length, count in zip(stream["length"], stream["count"], strict=True) if count == 1]
    assert sum(length == 700_000 for length in alone) == 200


def test_compare_per_step(tmp_path):
    for name, exposed, steps in (("a", 100, 2), ("b", 40, 4)):
        events = []
        for step in range(steps):
            at = step * 1000
            events += [event("user_annotation", f"ProfilerStep#{step}", at, 1000, 1, 1), kernel(GEMM, at, 500)]
            events += [kernel(SEND, at + 400, 100 + exposed, 20)]
        dsv3("analyze", write(tmp_path / f"{name}.json", events), "--out", tmp_path / name)
    compared = json.loads(dsv3("compare", tmp_path / "a" / "report.json", tmp_path / "b", "--json"))
    assert compared["per"] == "step"
    assert compared["compute_ms"]["a"] == compared["compute_ms"]["b"] == pytest.approx(0.5)
    assert compared["exposed_comm_ms"]["difference"] == pytest.approx(-0.06)
    assert compared["classes"][0]["class"] == "NCCL send/recv"
    assert "exposed comm" in dsv3("compare", tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="analyze it first"):
        dsv3("compare", tmp_path / "a.json", tmp_path / "b")
    with pytest.raises(UserError, match="cannot read"):
        dsv3("compare", Path("nowhere"), tmp_path / "b")


def test_marks_of_many_stretches_keep_their_sum_and_reach_to_the_end(tmp_path):
    from dsv3_train.profiling.boxes import marks
    from dsv3_train.profiling.trace import read
    from dsv3_train.profiling.work import works

    (work,) = works([read(write(tmp_path / "t.json", [kernel(SEND, n * 10, 4) for n in range(9000)]))], table())
    drawn = marks(work, work.exposed, most=500)
    assert len(drawn["start"]) <= 500
    assert sum(drawn["busy"]) == work.exposed.total == 9000 * 4000
    assert drawn["start"][-1] + drawn["length"][-1] == work.last - work.first


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_the_example_of_the_help_runs(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    with gzip.open("trace.json.gz", "wt") as file:
        json.dump([kernel(GEMM, 0, 10)], file)
    for folder in ("before", "after"):
        dsv3("analyze", "trace.json.gz", "--out", folder)
    example = re.search(r"Example: dsv3 profile (.*)$", dsv3(command, "--help"), re.MULTILINE)
    assert example
    assert dsv3(*shlex.split(example[1].strip(" │")))
