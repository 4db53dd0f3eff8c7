"""`dsv3 profile analyze` on synthetic traces with known answers, and against a count of every nanosecond."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dsv3_train.errors import UserError
from dsv3_train.pipeline.operations import Op, name_in_trace
from dsv3_train.profiling.intervals import union
from traces import ALL_REDUCE, GEMM, SEND, analyze, dsv3, event, kernel, launch, parts, write


def test_hidden_exposed_and_idle_of_two_streams(of):
    report = of(
        [
            kernel(GEMM, 1000, 400),
            kernel(ALL_REDUCE, 1200, 600, stream=20),  # 200 hidden, 300 exposed, 100 hidden under the second GEMM
            kernel(GEMM, 1700, 300),
            kernel(GEMM, 2500, 500),  # after a gap of 500
        ]
    )
    assert parts(report) == {
        "span_ms": 2.0,
        "compute_ms": 1.2,
        "comm_ms": 0.6,
        "exposed_comm_ms": 0.3,
        "hidden_fraction": 0.5,
        "idle_ms": 0.5,
        "kernels": 4,
    }
    (longest,) = report["exposures"]
    assert longest["start_ms"] == 0.4
    assert longest["ms"] == 0.3
    assert longest["kernels"][0]["name"] == ALL_REDUCE
    assert longest["before"]["name"] == longest["after"]["name"] == GEMM
    assert [(row["stream"], row["busy_ms"]) for row in report["streams"]] == [("stream 7", 1.2), ("stream 20", 0.6)]


@pytest.mark.parametrize(
    ("events", "compute", "comm", "exposed", "idle"),
    [
        # nested in time, on one stream, where the first is cut, and on two
        ([kernel(GEMM, 0, 100), kernel(GEMM, 20, 30)], 50, 0, 0, 0),
        ([kernel(SEND, 0, 100, 20), kernel(GEMM, 20, 30)], 30, 100, 70, 0),
        # touching: no gap, nothing exposed twice
        ([kernel(GEMM, 0, 50), kernel(SEND, 50, 50, 20), kernel(GEMM, 100, 50)], 100, 50, 50, 0),
        # of no length: no time, but a kernel
        ([kernel(GEMM, 0, 10), kernel(SEND, 20, 0, 20), kernel(GEMM, 30, 10)], 20, 0, 0, 20),
        # two communications at once count once
        ([kernel(SEND, 0, 60, 20), kernel(ALL_REDUCE, 30, 60, 21), kernel(GEMM, 50, 10)], 10, 90, 80, 0),
        # an asynchronous copy from the host is communication, one within the GPU and a memset are not
        (
            [
                kernel(GEMM, 0, 100),
                event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 100, 21, device=0, stream=21),
                event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 160, 20, 7, device=0, stream=7),
                event("gpu_memset", "Memset (Device)", 180, 20, 7, device=0, stream=7),
            ],
            140,
            100,
            50,
            10,
        ),
        # times as text, with decimals that a double could not hold
        (
            [kernel(GEMM, "1700000000000000.125", "0.250"), kernel(SEND, "1700000000000000.5", 1.5, 20)],
            0.25,
            1.5,
            1.5,
            0.125,
        ),
        # a stream known by its thread alone
        ([{"ph": "X", "cat": "Kernel", "name": GEMM, "pid": 0, "tid": 7, "ts": 5, "dur": 10}], 10, 0, 0, 0),
        # begin and end instead of a duration, one within the other, which on a stream cannot be
        (
            [
                {"ph": "B", "cat": "kernel", "name": GEMM, "pid": 0, "tid": 7, "ts": 0},
                {"ph": "B", "cat": "kernel", "name": "elementwise", "pid": 0, "tid": 7, "ts": 10},
                {"ph": "E", "pid": 0, "tid": 7, "ts": 20},
                {"ph": "E", "name": GEMM, "pid": 0, "tid": 7, "ts": 40.5},
            ],
            20,
            0,
            0,
            0,
        ),
    ],
)  # fmt: skip
def test_known_answers(of, events, compute, comm, exposed, idle):
    report = of(events)
    told = [report[key] for key in ("compute_ms", "comm_ms", "exposed_comm_ms", "idle_ms")]
    assert told == [us / 1000 for us in (compute, comm, exposed, idle)]
    assert report["span_ms"] == pytest.approx((compute + exposed + idle) / 1000, abs=1e-9)
    assert report["hidden_fraction"] == (pytest.approx(1 - exposed / comm) if comm else None)


@pytest.mark.parametrize("seed", range(25))
def test_parts_are_those_that_a_count_of_every_nanosecond_gives(of, seed):
    draw = random.Random(seed)
    kinds = {name: draw.random() < 0.4 for name in (GEMM, "elementwise", SEND, ALL_REDUCE)}
    chosen = [name for name in kinds if draw.random() < 0.8] or [SEND]
    free = {7: 0, 20: 0, 21: 0}
    rows = []
    for _ in range(draw.randrange(1, 120)):
        stream = draw.choice(list(free))
        start, duration = (
            free[stream] + draw.choice([0, 0, draw.randrange(300)]),
            draw.choice([0, 1, draw.randrange(900)]),
        )
        free[stream] = start + duration
        rows.append((draw.choice(chosen), start, duration, stream))
    written = []
    for index, (name, start, duration, stream) in enumerate(rows):
        follows = [other[1] for other in rows if other[3] == stream and other[1] > start]
        told = duration
        if follows and duration and draw.random() < 0.1:  # some run on into what follows them on their stream
            told = duration + draw.randrange(5000)
            rows[index] = name, start, min(told, min(follows) - start), stream
        written.append(kernel(name, f"{start // 1000}.{start % 1000:03}", told / 1000, stream))
    draw.shuffle(written)
    report = of(written)
    busy = {kind: np.zeros(max(free.values()) + 1000, dtype=bool) for kind in (True, False)}
    for name, start, duration, _ in rows:
        busy["nccl" in name][start : start + duration] = True
    first, last = min(row[1] for row in rows), max(row[1] + row[2] for row in rows)
    expected = {
        "span_ms": last - first,
        "compute_ms": busy[False].sum(),
        "comm_ms": busy[True].sum(),
        "exposed_comm_ms": (busy[True] & ~busy[False]).sum(),
        "idle_ms": (~busy[True] & ~busy[False])[first:last].sum(),
    }
    assert {key: report[key] for key in expected} == {key: ns / 1e6 for key, ns in expected.items()}
    # To the nanosecond: compute + exposed + idle = span.
    total = sum(round(report[key] * 1e6) for key in ("compute_ms", "exposed_comm_ms", "idle_ms"))
    assert total == round(report["span_ms"] * 1e6)
    assert sum(row["kernels"] for row in report["classes"]) == len(rows)


def test_sets_of_intervals_are_sets():
    draw = np.random.default_rng(0)
    for _ in range(200):
        a, b = (union(s := draw.integers(0, 60, n), s + draw.integers(0, 9, n)) for n in draw.integers(0, 12, 2))
        as_sets = [{t for s, e in zip(x.starts, x.ends, strict=True) for t in range(s, e)} for x in (a, b)]
        for ours, theirs in (
            (a & b, as_sets[0] & as_sets[1]),
            (a | b, as_sets[0] | as_sets[1]),
            (a - b, as_sets[0] - as_sets[1]),
        ):
            assert {t for s, e in zip(ours.starts, ours.ends, strict=True) for t in range(s, e)} == theirs
            assert ours.total == len(theirs)
            assert (ours.ends > ours.starts).all()
            assert (ours.starts[1:] > ours.ends[:-1]).all()
        times = draw.integers(-5, 80, 20)
        assert a.before(times).tolist() == [sum(moment < t for moment in as_sets[0]) for t in times]


def test_two_ranks_with_clocks_apart(tmp_path):
    """Each is measured on its own clock; the one that comes last is found by durations, the offset by ends."""
    paths = []
    for rank, (skew, late) in enumerate([(0, 0), (5_000_000, 300)]):
        events = []
        for step in range(8):
            start = skew + step * 2000
            events += [kernel(GEMM, start, 500 + late), kernel(ALL_REDUCE, start + 500 + late, 400 - late, 20)]
        paths.append(write(tmp_path / f"{rank}.json", events, distributedInfo={"rank": rank}))
    report = analyze(*reversed(paths))
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert [rank["comm_ms"] for rank in report["ranks"]] == [3.2, pytest.approx(0.8)]
    assert report["across"]["straggler"] == 1
    assert report["across"]["waited_for_ms"] == {"0": 0.0, "1": pytest.approx(8 * 0.3)}
    assert report["across"]["clock_offset_ms"] == {"1": 5000.0}
    assert report["findings"][0]["kind"] == "straggler"
    assert "rank 1 comes last" in dsv3("analyze", *paths)


def test_even_ranks_have_no_straggler(tmp_path):
    draw = random.Random(0)
    paths = []
    for rank in range(4):
        events = [kernel(GEMM, 0, 10)]
        for step in range(40):
            events.append(kernel(ALL_REDUCE, 1000 * step + 100, 300 + draw.randrange(40), 20))
        paths.append(write(tmp_path / f"trace_rank-{rank}.json", events))
    assert analyze(*paths)["across"]["straggler"] is None


def test_ranks_are_read_from_names_else_counted(tmp_path):
    named = [write(tmp_path / f"rank_{rank}.json", [kernel(GEMM, 0, 10)]) for rank in (3, 1)]
    assert [rank["rank"] for rank in analyze(*named)["ranks"]] == [1, 3]
    plain = [write(tmp_path / name, [kernel(GEMM, 0, duration)]) for name, duration in (("a.json", 20), ("b.json", 10))]
    assert [(rank["rank"], rank["span_ms"]) for rank in analyze(*plain)["ranks"]] == [(0, 0.02), (1, 0.01)]
    with pytest.raises(UserError, match="both are of rank 1; give one trace of each rank"):
        analyze(named[1], named[1])


def test_gpus_of_one_process_are_ranks_of_their_own(of):
    events = [event("kernel", GEMM, 0, 10, device=0, stream=7), event("kernel", GEMM, 5, 20, pid=1, device=1, stream=7)]
    report = of(events)
    assert [(rank["rank"], rank["device"], rank["span_ms"]) for rank in report["ranks"]] == [(0, 0, 0.01), (1, 1, 0.02)]


def test_an_exposed_copy_on_the_compute_stream_is_named(of):
    copy = event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 100, 60, 7, device=0, stream=7)
    events = [kernel(GEMM, 0, 100), copy, kernel(GEMM, 160, 100)]
    (found,) = (one for one in of(events)["findings"] if one["kind"] == "exposed copy")
    assert "1 x Memcpy DtoH (Device -> Pageable) on stream 7, which also computes" in found["text"]
    assert found["ms"] == 0.06
    # On a stream of its own beside compute it is no fault.
    aside = event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 100, 60, 21, device=0, stream=21)
    assert not of([kernel(GEMM, 0, 100), aside, kernel(GEMM, 100, 160)])["findings"]


def test_gaps_in_which_the_gpu_waits_for_launches(of):
    events = [
        kernel(GEMM, 100, 100, correlation=1),
        launch(1, 50),
        # Launched at 500, while the GPU has been waiting since 200; starts at 510.
        launch(2, 500, 4),
        kernel(GEMM, 510, 90, correlation=2),
        event("cpu_op", "aten::item", 150, 340, 1, 1),
        # Launched early; 50 us late for another reason.
        launch(3, 505, 1),
        kernel(GEMM, 650, 50, correlation=3),
        # No launch known.
        kernel(GEMM, 730, 10),
    ]
    idle = of(events)["idle"]
    assert (idle["host_bound_ms"], idle["launched_ms"], idle["unknown_ms"]) == (0.304, pytest.approx(0.056), 0.03)
    assert idle["gaps"][0]["host_did"] == "aten::item"
    assert idle["gaps"][0]["host_bound_ms"] == 0.304
    assert idle["gaps"][2]["host_bound_ms"] is None


def test_a_copys_call_that_waits_for_the_stream_is_not_the_hosts_fault(of):
    def after(begins):
        copy = event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 500, 100, 7, device=0, stream=7, correlation=1)
        return of([kernel(GEMM, 0, 100), copy, launch(1, begins, 700 - begins, "cudaMemcpyAsync")])["idle"]

    assert after(50)["host_bound_ms"] == 0.0  # began while the GPU was busy
    assert after(300)["host_bound_ms"] == 0.4


def test_steps_and_named_ranges_follow_the_launches(of):
    events = []
    for step in range(3):
        at = step * 1000
        events += [
            event("user_annotation", f"ProfilerStep#{step + 5}", at, 1000, 1, 1),
            event("user_annotation", "dispatch", at + 100, 100, 1, 1),
            launch(10 * step + 1, at + 10),
            launch(10 * step + 2, at + 150, thread=2),  # as autograd's threads do
            # The GPU is two steps behind the host.
            kernel(GEMM, at + 2000, 600, correlation=10 * step + 1),
            kernel(SEND, at + 2500, 300, 20, correlation=10 * step + 2),
        ]
    report = of(events)
    assert [(row["step"], row["start_ms"], row["span_ms"]) for row in report["steps"]] == [
        (5, 0.0, 1.0),
        (6, 1.0, 1.0),
        (7, 2.0, 0.8),
    ]
    for row in report["steps"]:
        assert (row["compute_ms"], row["comm_ms"], row["exposed_comm_ms"]) == (0.6, 0.3, 0.2)
        assert row["compute_ms"] + row["exposed_comm_ms"] + row["idle_ms"] == pytest.approx(row["span_ms"])
    (dispatch,) = report["ranges"]
    assert (dispatch["name"], dispatch["count"], dispatch["kernels"]) == ("dispatch", 3, 3)
    assert (dispatch["comm_ms"], dispatch["exposed_comm_ms"]) == (pytest.approx(0.9), pytest.approx(0.6))


def test_pairs_are_told_from_what_stands_alone(of):
    """By the names that schedules give their operations: a forward whose all-to-all is exposed, then two pairs."""
    names = (
        name_in_trace((Op("F", 0, 1, 0),)),
        name_in_trace((Op("F", 0, 1, 1), Op("B", 1, 0, 0))),
        name_in_trace((Op("F", 0, 1, 2), Op("B", 1, 0, 1))),
        "attention & experts",  # somebody's own
    )
    events = []
    for number, name in enumerate(names):
        at, alone = number * 1000, number in (0, 3)
        events += [
            event("user_annotation", name, at, 900, 1, 1),
            launch(10 * number + 1, at + 10),
            launch(10 * number + 2, at + 20),
            kernel(GEMM, at + 100, 500, correlation=10 * number + 1),
            kernel(SEND, at + (600 if alone else 350), 300, 20, correlation=10 * number + 2),
        ]
    report = of(events)
    assert report["hidden_fraction"] == pytest.approx(500 / 1200)
    pairs = report["pairs"]
    assert (pairs["count"], pairs["kernels"]) == (2, 4)
    parts = [pairs[key] for key in ("compute_ms", "comm_ms", "exposed_comm_ms", "hidden_fraction")]
    assert parts == pytest.approx([1.0, 0.6, 0.1, 5 / 6])
    (sent,) = pairs["communication"]
    assert (sent["kernels"], sent["union_ms"], sent["exposed_ms"]) == (2, pytest.approx(0.6), pytest.approx(0.1))
    assert of(events[:5])["pairs"] is None


def test_steps_and_ranges_that_only_the_gpu_tells_of(of):
    events = []
    for step in range(2):
        at = step * 1000
        events += [
            event("gpu_user_annotation", f"ProfilerStep#{step}", at, 900, 7, 0),
            event("gpu_user_annotation", "combine", at + 500, 300, 20, 0),
            launch(10 * step + 1, at - 5000),
            kernel(GEMM, at, 600, correlation=10 * step + 1),
            launch(10 * step + 2, at - 4000),
            kernel(SEND, at + 500, 300, 20, correlation=10 * step + 2),
        ]
    report = of(events)
    assert [(row["step"], row["span_ms"], row["exposed_comm_ms"]) for row in report["steps"]] == [
        (0, 1, 0.2),
        (1, 0.8, 0.2),
    ]
    assert [(row["name"], row["kernels"], row["comm_ms"]) for row in report["ranges"]] == [("combine", 2, 0.6)]
