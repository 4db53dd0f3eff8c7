"""`dsv3 profile analyze` on synthetic traces with known answers, and against a count of every nanosecond."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.profiling.classes import table
from dsv3_train.profiling.gemm import flops
from dsv3_train.profiling.intervals import union
from traces import ALL_REDUCE, GEMM, SEND, event, kernel, launch, write


def dsv3(*arguments: object) -> str:
    result = CliRunner().invoke(main.app, ["profile", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def analyze(*arguments: object) -> dict:
    return json.loads(dsv3("analyze", *arguments, "--json"))


@pytest.fixture
def of(tmp_path):
    """The report of one rank's events."""
    return lambda events, **header: analyze(write(tmp_path / "trace.json", events, **header))


def parts(report: dict) -> dict:
    keys = ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "hidden_fraction", "idle_ms", "kernels")
    return {key: report[key] for key in keys}


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
        # nested in time, on one stream and on two
        ([kernel(GEMM, 0, 100), kernel(GEMM, 20, 30)], 100, 0, 0, 0),
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
        # begin and end instead of a duration, one within the other
        (
            [
                {"ph": "B", "cat": "kernel", "name": GEMM, "pid": 0, "tid": 7, "ts": 0},
                {"ph": "B", "cat": "kernel", "name": "elementwise", "pid": 0, "tid": 7, "ts": 10},
                {"ph": "E", "pid": 0, "tid": 7, "ts": 20},
                {"ph": "E", "name": GEMM, "pid": 0, "tid": 7, "ts": 40.5},
            ],
            40.5,
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
    rows = [
        (
            draw.choice(chosen),
            draw.randrange(20_000),
            draw.choice([0, 1, draw.randrange(900)]),
            draw.choice([7, 20, 21]),
        )
        for _ in range(draw.randrange(1, 120))
    ]
    report = of([kernel(name, f"{s // 1000}.{s % 1000:03}", d / 1000, stream) for name, s, d, stream in rows])
    busy = {True: np.zeros(21_000, dtype=bool), False: np.zeros(21_000, dtype=bool)}
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


def test_gemm_tflops_where_shapes_are_known(of):
    m, n, k = 4096, 2048, 7168
    events = [
        event("cpu_op", "aten::linear", 0, 20, 1, 1, **{"External id": 9, "Input Dims": [[m, k], [n, k], []]}),
        event("cpu_op", "aten::mm", 1, 18, 1, 1, **{"External id": 10, "Input Dims": [[m, k], [k, n]]}),
        launch(1, 5),
        launch(2, 7),
        kernel(GEMM, 10, 150, correlation=1),
        kernel("void splitKreduce_kernel<float>()", 160, 50, correlation=2),  # of the same product
        kernel(GEMM, 300, 100),  # of an unknown one
    ]
    gemm = of(events)["gemm"]
    assert gemm["with_shapes_ms"] == pytest.approx(0.2)
    assert gemm["ms"] == pytest.approx(0.3)
    assert gemm["tflops"] == pytest.approx(2 * m * n * k / 200e-6 / 1e12)


@pytest.mark.parametrize(
    ("operator", "dims", "expected"),
    [
        ("aten::mm", [[2, 3], [3, 5]], 60),
        ("aten::addmm", [[5], [2, 3], [3, 5], [], []], 60),
        ("aten::linear", [[7, 2, 3], [5, 3], [5]], 420),
        ("aten::bmm", [[4, 2, 3], [4, 3, 5]], 240),
        ("aten::matmul", [[2, 3], [4, 3, 5]], 240),
        ("aten::_scaled_mm", [[2, 3], [3, 5], [], []], 60),
        ("aten::mm", [[2, 3], [4, 5]], None),
        ("aten::mm", "nonsense", None),
    ],
)
def test_flops_of_shapes(operator, dims, expected):
    assert flops(operator, dims) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ncclKernel_AllReduce_RING_LL_Sum_half(ncclWork*)", "NCCL all-reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevComm*)", "NCCL reduce-scatter"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
        ("void deep_ep::internode::dispatch<false, 8, false>(int4*)", "DeepEP dispatch"),
        ("void deep_ep::internode_ll::combine<true, 3, 7168, 9>(void*)", "DeepEP combine"),
        ("void deep_ep::intranode::cached_notify_combine<8>(void**)", "DeepEP notify"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "GEMM bf16"),
        ("nvjet_qqtst_128x256_128x4_1x2_h_bz_TNT", "GEMM fp8"),
        ("nvjet_sm90_qqtst_128x256_128x4_1x2_h_bz_TNT", "GEMM fp8"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM bf16"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 7168u>(float*)", "GEMM fp8"),
        ("void cutlass::device_kernel<cutlass::gemm::GemmUniversal<cutlass::float_e4m3_t, bfloat16_t>>", "GEMM fp8"),
        ("ampere_sgemm_128x64_tn", "GEMM fp32"),
        ("void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_64x64_16x6_nn_align4>", "GEMM tf32"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3i_128x64x192_bwd", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x64x64", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, int)", "attention backward"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, int)", "attention backward"),
        ("void transformer_engine::block_scaled_1d_cast_transpose_kernel<true>(float*)", "quantise"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<>", "norm"),
        ("void at::native::elementwise_kernel<128, direct_copy_kernel_cuda(at::Tensor&)::{lambda()#3}>", "elementwise"),
        ("_permute_kernel", "permute and sort"),
        ("my_secret_kernel_17", "unclassified"),
    ],
)  # fmt: skip
def test_classes_of_kernels(name, expected):
    assert table().classify("kernel", name)[0] == expected


def test_an_all_to_all_is_named_by_what_torch_says_of_it(of):
    meta = {"Collective name": "all_to_allv", "Process Group Name": "2"}
    assert of([kernel(SEND, 0, 10, 20, **meta)])["classes"][0]["class"] == "NCCL all-to-all"


def test_unknown_kernels_are_listed_and_rules_of_ones_own_come_first(tmp_path):
    path = write(tmp_path / "t.json", [kernel("my_secret_kernel_1", 0, 10), kernel("my_secret_kernel_2", 10, 30)])
    report = analyze(path)
    assert report["unclassified"] == {
        "ms": 0.04,
        "names": [{"name": "my_secret_kernel_2", "ms": 0.03}, {"name": "my_secret_kernel_1", "ms": 0.01}],
    }
    assert report["compute_ms"] == 0.04
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {class: my all-to-all, kind: communication, match: "MY_secret"}\n')
    report = analyze(path, "--classes", rules)
    assert (report["comm_ms"], report["exposed_comm_ms"]) == (0.04, 0.04)
    assert report["classes"][0]["class"] == "my all-to-all"


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
            {"ph": "E", "pid": 0, "tid": 7, "ts": 3},
            {"ph": "X", "cat": ["kernel"], "name": {}, "pid": [], "tid": {}},
            {},
        ]
    )
    assert report["kernels"] == 1
    assert report["notes"] == [
        "4 events without a usable ts or dur were left out",
        "1 B or E events without their other half were left out",
    ]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("[", "not YAML"),
        ("{}", "a list of"),
        ("- {class: a, kind: compute}", "rule 1: has to have the keys"),
        ("- {class: a, kind: both, match: x}", "rule 1: kind is compute or communication"),
        ('- {class: a, kind: compute, match: "("}', "rule 1: match is no regular expression"),
    ],
)
def test_bad_rules_are_told(tmp_path, rules, told):
    path = write(tmp_path / "t.json", [kernel(GEMM, 0, 10)])
    (tmp_path / "rules.yaml").write_text(rules)
    with pytest.raises(UserError, match=told):
        analyze(path, "--classes", tmp_path / "rules.yaml")


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

    events = [kernel(GEMM, n * 10, 8 if n % 100 else 700) for n in range(20_000)]
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
