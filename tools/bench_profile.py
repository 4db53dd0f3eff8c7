"""Time and memory of `dsv3 profile analyze` on synthetic traces of growing size.

    python tools/bench_profile.py --events 10000 100000 1000000

A trace is as torch.profiler writes it: per kernel an operator, a launch, two flow events and the kernel, with their
arguments, over 4 streams and 20 steps. Each is analysed by the command, in a process of its own; times are the least
of `--repeat`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_NAMES = (
    "void cutlass::device_kernel<flash::FlashAttnFwd<bf16, 128>>(Params)",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>(int, Array<char*>)",
    "void transformer_engine::block_scaled_1d_cast_transpose_kernel<true, float, __nv_bfloat16>(float*, int)",
)
_COMM = ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL")


def write(path: Path, events: int) -> None:
    """A trace of about so many events."""
    kernels = events // 5
    with path.open("w") as file:
        file.write('{"schemaVersion": 1, "distributedInfo": {"rank": 0, "world_size": 8}, "traceEvents": [\n')
        for step in range(20):
            start, length = step * kernels // 20 * 20.0, kernels // 20 * 20.0
            file.write(_event("user_annotation", f"ProfilerStep#{step}", 1, 1, start, length, {}) + ",\n")
        for number in range(kernels):
            at = number * 20.0 + 0.125
            comm = number % 8 == 7
            stream = 20 + number % 3 if comm else 7
            name = _COMM[number // 8 % 2] if comm else _NAMES[number % 4]
            args = {"External id": number, "correlation": number}
            kernel = {**args, "device": 0, "context": 1, "stream": stream, "registers per thread": 128}
            kernel |= {"shared memory": 0, "blocks per SM": 3.878788, "grid": [64, 8, 1], "block": [256, 1, 1]}
            flow = {"ph": "s", "id": number, "pid": 1, "tid": 1, "ts": at + 2, "cat": "ac2g", "name": "ac2g"}
            dims = {"External id": number, "Input Dims": [[4096, 7168], [7168, 2048]], "Ev Idx": number}
            lines = (
                _event("cpu_op", "aten::mm", 1, 1, at, 15.5, dims),
                _event("cuda_runtime", "cudaLaunchKernel", 1, 1, at + 2, 5.25, args),
                json.dumps(flow),
                json.dumps({**flow, "ph": "f", "bp": "e", "pid": 0, "tid": stream}),
                _event("kernel", name, 0, stream, at + 8, 55.0 if comm else 17.5 - number % 5, kernel),
            )
            file.write(",\n".join(lines) + (",\n" if number + 1 < kernels else "\n"))
        file.write("]}\n")


def _event(cat: str, name: str, pid: int, tid: int, ts: float, dur: float, args: dict) -> str:
    event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}
    return json.dumps(event)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time and peak resident GiB of a command."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    """Print a line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pictures", action="store_true", help="also write the page and the PNG")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for events in options.events:
            trace = Path(folder) / "trace.json"
            write(trace, events)
            command = [sys.executable, "-m", "dsv3_cli.main", "profile", "analyze", str(trace)]
            command += ["--out", folder] if options.pictures else ["--json"]
            runs = [measure(command) for _ in range(options.repeat)]
            seconds, cpu, memory = min(r[0] for r in runs), min(r[1] for r in runs), max(r[2] for r in runs)
            size = trace.stat().st_size / 2**20
            print(
                f"{events:9,d} events ({size:6.1f} MiB): {seconds:6.2f} s, {cpu:6.2f} s of CPU, {memory:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
