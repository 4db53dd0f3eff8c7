"""Which GPU and stream a kernel is of: traces whose hidden fraction is known by how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv3_train.errors import UserError
from dsv3_train.profiling.classes import table
from traces import ALL_REDUCE, GEMM, analyze, dsv3, event, kernel, launch, write

STEPS, STEP = 20, 1000


def steps(hidden: float, gemm: str = GEMM, comm: str = ALL_REDUCE, **more: Any) -> list[dict]:
    """`STEPS` times 600 us of compute on stream 7, and 400 us of communication on stream 20 of which `hidden` runs
    beside it."""
    found = []
    for step in range(STEPS):
        at = step * STEP
        found += [placed(gemm, at + 200 * part, 200, 7, **more) for part in range(3)]
        found.append(placed(comm, at + 600 - 400 * hidden, 400, 20, **more))
    return found


def placed(
    name: str,
    start: float,
    duration: float,
    stream: int,
    pid: Any = 0,
    device: Any = 0,
    shift: float = 0.0,
    **args: Any,
) -> dict:
    return event("kernel", name, start + shift, duration, stream, pid, device=device, stream=stream, **args)


def late(events: list[dict], every: int) -> list[dict]:
    """The first kernel of every so many steps ends 700 us too late: 300 us after all compute of its step."""
    return [
        {**one, "dur": one["dur"] + 700} if one["tid"] == 7 and one["ts"] % (every * STEP) == 0 else one
        for one in events
    ]


def named(pid: Any, name: str, tid: Any = None) -> dict:
    what = "process_name" if tid is None else "thread_name"
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def fractions(report: dict) -> list[float]:
    return [rank["hidden_fraction"] for rank in report.get("ranks", [report])]


def test_kernels_that_run_on_are_cut_where_the_next_of_their_stream_begins(of):
    report = of(late(steps(0.25), every=2))
    assert report["hidden_fraction"] == pytest.approx(0.25, abs=0.001)
    assert report["span_ms"] == pytest.approx(STEPS - 0.1)  # the last all-reduce ends at 900 us of its step
    assert report["cut"] == {"kernels": STEPS // 2, "ms": STEPS // 2 * 0.7}
    told = "10 of 80 kernels ran into the next kernel of their stream and were cut there, by 7.000 ms in all"
    assert report["notes"][0] == told


def test_the_kernel_that_hid_all_else(of):
    """A kernel of 100 us written with 16 ms, and the others of its stream within."""
    events = [kernel("fmha_bwd_kernel", 0, 16000, 3), *(kernel(GEMM, 100 * n, 90, 3) for n in range(1, 11))]
    report = of([*events, kernel(ALL_REDUCE, 5000, 2000, 5)])
    assert (report["hidden_fraction"], report["exposed_comm_ms"], report["span_ms"]) == (0.0, 2.0, 7.0)
    assert report["cut"] == {"kernels": 1, "ms": 15.9}
    assert "1 of 12 kernels ran into the next kernel of their stream" in dsv3("analyze", report["file"])


def test_programmatic_launches_that_begin_a_little_early_change_nothing(of):
    events = [kernel(GEMM, 100 * n, 105) for n in range(50)] + [kernel(ALL_REDUCE, 4900, 210, 20)]
    report = of(events)
    assert report["compute_ms"] == pytest.approx(5.005)
    assert report["hidden_fraction"] == pytest.approx(0.5)


def test_several_processes_and_hosts_in_one_file(of):
    """Each with a device 0, and clocks apart; in either order."""
    of_rank = {"host1:4711": 0.75, "host1:4712": 0.5, "host2:4711": 0.25, "host2:4712": 0.0}
    events = [
        one
        for number, (pid, hidden) in enumerate(of_rank.items())
        for one in steps(hidden, pid=pid, shift=number * 137.0)
    ]
    report = of(events)
    assert fractions(report) == pytest.approx(list(of_rank.values()), abs=0.001)
    assert [rank["process"] for rank in report["ranks"]] == list(of_rank)
    assert {rank["device"] for rank in report["ranks"]} == {0}
    assert report["hidden_fraction"] == pytest.approx(0.375)
    assert fractions(of(events[::-1])) == fractions(report)
    assert "0: host1:4711, 0" in dsv3("analyze", report["ranks"][0]["file"])


def test_ranks_are_read_from_the_names_of_processes(of):
    events = [named(10, "rank 7"), named(11, "rank 3"), *steps(0.5, pid=10), *steps(1.0, pid=11)]
    report = of(events, distributedInfo={"rank": 0})
    assert [(rank["rank"], rank["hidden_fraction"]) for rank in report["ranks"]] == [
        (3, pytest.approx(1.0)),
        (7, pytest.approx(0.5)),
    ]


def launched(events: list[dict], host: int, first: int) -> list[dict]:
    """Kernels with correlations from `first` on, and the host's launches of them, some of it in a step."""
    found: list[dict] = [event("user_annotation", f"ProfilerStep#{host}", -10, 1e6, 1, host)]
    for number, one in enumerate(events, first):
        found.append({**one, "args": {**one["args"], "correlation": number}})
        found.append({**launch(number, one["ts"] - 5), "pid": host})
    return found


def test_one_device_number_for_all_is_told_apart_by_what_launched(of):
    """Kineto's pid of a kernel is its device, so that ranks that see one GPU each all have 0."""
    events = launched(steps(0.25), 100, 1) + launched(steps(0.75, shift=300.0), 200, 5000)
    report = of(events)
    assert fractions(report) == pytest.approx([0.25, 0.75], abs=0.001)
    assert [[step["step"] for step in rank["steps"]] for rank in report["ranks"]] == [[100], [200]]
    assert [rank["idle"]["unknown_ms"] for rank in report["ranks"]] == [0.0, 0.0]


def test_what_cannot_be_told_apart_is_refused_by_name(of):
    both = launched(steps(0.25), 100, 1) + launched(steps(0.75, shift=300.0), 200, 1)
    with pytest.raises(
        UserError, match=r"trace\.json: 2 processes \(100, 200\) launch work, and it cannot be told which"
    ):
        of(both)
    without_launches = [one for one in both if one["cat"] == "kernel"]
    with pytest.raises(UserError, match=r"GPU 0 of process 0: \d+% of the kernels of stream \d+ begin while the one"):
        of(without_launches)
    with pytest.raises(UserError, match="pid 0 is two processes \\('host a', 'host b'\\)"):
        of([named(0, "host a"), named(0, "host b"), *steps(0.5)])


def test_steps_of_several_processes_without_launches_are_each_ones_own(of):
    events = [event("user_annotation", f"ProfilerStep#{pid}", -10, 1e6, 1, pid) for pid in (100, 200)]
    ranks = of([*events, *steps(0.5, pid=100), *steps(0.25, pid=200)])["ranks"]
    assert [[step["step"] for step in rank["steps"]] for rank in ranks] == [[100], [200]]
    with pytest.raises(UserError, match="cannot be told which"):
        of([*events, *steps(0.5)])


def test_launches_of_several_processes_are_each_ones_own(of):
    """Correlations count from 1 in every process: those of another say nothing of a GPU."""
    events = launched(steps(0.5, pid=100), 100, 1) + launched(steps(0.5, pid=200, shift=3e5), 200, 1)
    ranks = of(events)["ranks"]
    assert [[step["step"] for step in rank["steps"]] for rank in ranks] == [[100], [200]]
    assert [rank["idle"]["unknown_ms"] for rank in ranks] == [0.0, 0.0]
    # Where the pid of a kernel is its device, whose launch it was is not known, and not guessed.
    kineto = launched(steps(0.5), 100, 1) + launched(steps(0.5, pid=1, device=1, shift=3e5), 200, 1)
    ranks = of(kineto)["ranks"]
    assert [rank["hidden_fraction"] for rank in ranks] == pytest.approx([0.5, 0.5])
    assert [rank["steps"] for rank in ranks] == [[], []]
    assert all("does not say which process launched this GPU's work" in rank["notes"][0] for rank in ranks)


def test_steps_that_only_the_gpu_tells_of_are_those_of_their_gpu(of):
    events = steps(0.5) + steps(0.5, pid=1, device=1)
    events += [event("gpu_user_annotation", f"ProfilerStep#{pid}", 0, STEPS * STEP, 7, pid) for pid in (0, 1)]
    assert [[step["step"] for step in rank["steps"]] for rank in of(events)["ranks"]] == [[0], [1]]


AMD_GEMM = "Cijk_Ailk_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x256x64_MI16x16x1_SN"
RCCL = "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)"


def copies(cat: str, name: str, **args: Any) -> list[dict]:
    """Of 100 us each, at the end of every step, beside nothing."""
    return [
        event(cat, name, n * STEP + 880, 100, 7, 2, device=2, stream=7, **args) for n in range(STEPS)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cat", "name", "args"),
    [
        ("gpu_memcpy", "CopyDeviceToDevice", {}),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", {}),
        ("gpu_memcpy", "MEMORY_COPY_DEVICE_TO_DEVICE", {}),
        ("gpu_memcpy", "hipMemcpyDtoDAsync", {}),
        ("gpu_memcpy", "hipMemcpyAsync", {"kind": "DtoD"}),
        ("gpu_memcpy", "hipMemcpyAsync", {}),
        ("kernel", "CopyDeviceToDevice", {}),
        ("kernel", "__amd_rocclr_copyBuffer", {}),
        ("gpu_memset", "FillBuffer", {}),
    ],
)
def test_amds_local_copies_are_not_communication(of, cat, name, args):
    report = of([*steps(0.5, AMD_GEMM, RCCL, pid=2, device=2), *copies(cat, name, **args)])
    assert report["hidden_fraction"] == pytest.approx(0.5, abs=0.001)
    assert {row["class"] for row in report["classes"] if row["kind"] == "communication"} == {"NCCL"}
    # What says no way is listed, and nothing else is.
    assert [row["name"] for row in report["unclassified"]["names"]] == (
        [name] if name == "hipMemcpyAsync" and not args else []
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Memcpy HtoD (Pinned -> Device)", ("copy HtoD", "communication")),
        ("Memcpy DtoH (Device -> Pageable)", ("copy DtoH", "communication")),
        ("Memcpy PtoP (Device -> Device)", ("copy PtoP", "communication")),
        ("MemcpyH2D", ("copy HtoD", "communication")),
        ("MemcpyD2H", ("copy DtoH", "communication")),
        ("MemcpyP2P", ("copy PtoP", "communication")),
        ("CopyHostToDevice", ("copy HtoD", "communication")),
        ("CopyDeviceToHost", ("copy DtoH", "communication")),
        ("MEMORY_COPY_HOST_TO_DEVICE", ("copy HtoD", "communication")),
        ("MEMORY_COPY_DEVICE_TO_HOST", ("copy DtoH", "communication")),
        ("Memcpy HtoA (Pinned -> Array)", ("copy HtoD", "communication")),
        ("MemcpyD2D", ("copy DtoD", "compute")),
        ("Memcpy <unknown> (Device -> Device)", ("copy DtoD", "compute")),
        ("MemcpyOther", ("unclassified", "compute")),
        ("hipMemcpy", ("unclassified", "compute")),
    ],
)
def test_ways_of_copies(name, expected):
    assert table().classify("memcpy", name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all-reduce-start.12", ("XLA collective", "communication")),
        ("collective-permute-done.3", ("XLA collective", "communication")),
        ("stream_executor::gpu::AllReduceKernelImpl<float>", ("other collective", "communication")),
        ("copy-start.4", ("elementwise", "compute")),
        ("loop_reduce_fusion_3", ("reduction", "compute")),
        ("triton_red_fused_all_reduce_add_0", ("reduction", "compute")),
        ("somebodys_all_gather_v2", ("unclassified", "compute")),
        ("my_reduce_scatter_3", ("unclassified", "compute")),
    ],
)
def test_kernels_named_after_collectives(name, expected):
    assert table().classify("kernel", name) == expected


def test_xla_with_two_gpus_and_local_copies(of):
    events = []
    for pid, hidden in ((1, 0.25), (2, 0.75)):
        events += [named(pid, f"/device:GPU:{pid - 1}"), named(pid, "Stream #13(Compute)", 7)]
        events += [
            named(pid, "Stream #20(Compute)", 20),
            named(pid, "XLA Ops", 30),
            named(pid, "Stream #21(MemcpyD2D)", 21),
        ]
        plain = steps(
            hidden, "gemm_fusion_dot_3", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", pid=pid, shift=pid * 50.0
        )
        events += [{key: value for key, value in one.items() if key != "cat"} | {"args": {}} for one in plain]
        for n in range(STEPS):
            copy = {"ph": "X", "pid": pid, "ts": n * STEP + 905 + 50 * pid, "args": {}}
            events += [{**copy, "tid": 21, "name": "MemcpyD2D", "dur": 90}]
            events += [{**copy, "tid": 30, "name": "all-reduce-start.1", "dur": 900}]  # what is on no stream counts not
    report = of(events)
    assert fractions(report) == pytest.approx([0.25, 0.75], abs=0.001)
    assert [rank["copies"] for rank in report["ranks"]] == [STEPS, STEPS]


def test_pytorch_before_kineto_has_no_streams_but_devices(of):
    """Kernels of all streams of a device are one thread of `CUDA functions`: they may run side by side."""
    events = []
    for device, hidden in ((0, 0.5), (1, 1.0)):
        events += [
            {"ph": "X", "name": one["name"], "ts": one["ts"], "dur": one["dur"], "tid": device, "pid": "CUDA functions"}
            for one in steps(hidden)
        ]
    report = of(events)
    assert fractions(report) == pytest.approx([0.5, 1.0], abs=0.001)
    assert [rank["device"] for rank in report["ranks"]] == [0, 1]


def test_streams_of_two_contexts_with_one_number_are_two(of):
    events = [kernel(GEMM, 0, 100, context=1), kernel(ALL_REDUCE, 20, 40, context=2)]
    report = of(events)
    assert report["hidden_fraction"] == 1.0
    assert [row["stream"] for row in report["streams"]] == ["stream 7", "7 (context 2)"]


def test_processes_on_a_cpu_do_not_hide_each_others_communication(of):
    events = [
        event("cpu_op", "aten::mm", 0, 100, 1, 1),
        event("cpu_op", "gloo:all_reduce", 50, 50, 2, 1),
        event("cpu_op", "gloo:all_reduce", 0, 100, 1, 2),
    ]
    report = of(events)
    assert fractions(report) == [1.0, 0.0]
    assert analyze(write(Path(report["ranks"][0]["file"]), events[:2]))["hidden_fraction"] == 1.0


def test_a_broken_time_stamp_is_not_taken_for_a_span(of):
    with pytest.raises(UserError, match="its events span 23 days"):
        of([kernel(GEMM, 0, 10), kernel(GEMM, 2_000_000_000_000, 10)])
