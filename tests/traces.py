"""Synthetic traces with known answers, for the tests of `dsv3 profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"


def event(cat: str, name: str, start: Any, duration: Any, tid: Any = 7, pid: Any = 0, **args: Any) -> dict:
    """A complete event; times in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args}


def kernel(name: str, start: Any, duration: Any, stream: int = 7, **args: Any) -> dict:
    return event("kernel", name, start, duration, stream, device=0, stream=stream, **args)


def launch(
    correlation: int, start: float, duration: float = 1, name: str = "cudaLaunchKernel", thread: int = 1
) -> dict:
    return event("cuda_runtime", name, start, duration, thread, 1, correlation=correlation)


def write(path: Path, events: list[Any], **header: Any) -> Path:
    path.write_text(json.dumps({"schemaVersion": 1, **header, "traceEvents": events}))
    return path


def own_times(path: Path) -> dict[str, float]:
    """Of a trace: milliseconds per kernel, or per operator without those that it calls."""
    from dsv3_train.profiling.classes import table
    from dsv3_train.profiling.trace import read
    from dsv3_train.profiling.work import works

    (work,) = works([read(path)], table())
    times: dict[str, float] = {}
    for kernel_ in range(len(work.start)):
        name = work.text(kernel_)
        times[name] = times.get(name, 0.0) + float(work.end[kernel_] - work.start[kernel_]) / 1e6
    return times


def dsv3(*arguments: object) -> str:
    """What `dsv3 profile` prints."""
    from typer.testing import CliRunner

    from dsv3_cli import main

    result = CliRunner().invoke(main.app, ["profile", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def analyze(*arguments: object) -> dict:
    return json.loads(dsv3("analyze", *arguments, "--json"))


def parts(report: dict) -> dict:
    keys = ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "hidden_fraction", "idle_ms", "kernels")
    return {key: report[key] for key in keys}
