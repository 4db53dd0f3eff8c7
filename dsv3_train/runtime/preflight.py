"""Before a run begins: is every node whole, are all the same, does one compute otherwise, is one or a link slow?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat
from dsv3_train.runtime.environment import versions
from dsv3_train.runtime.exchange import exchange
from dsv3_train.runtime.rendezvous import Presence

_LEAST_SECONDS = 5e-3
"""A difference below this is no finding."""


def presence(recipe: Recipe, device: str, run_dir: Path, rank: int) -> Presence:
    """What can be said of this rank and its node without the others."""
    known = {name: version for name, version in versions().items() if version is not None}
    faults = node_faults(recipe, device, run_dir) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    return Presence(rank, platform.node(), known, faults)


def node_faults(recipe: Recipe, device: str, run_dir: Path) -> list[str]:
    """Why this node cannot take part in a run: GPUs missing or with memory errors, nowhere to write."""
    faults = list(_disk_faults(run_dir))
    if device == "cuda":
        wanted = min(recipe.parallel.world_size, recipe.parallel.gpus_per_node)
        if torch.cuda.device_count() < wanted:
            faults.append(f"{torch.cuda.device_count()} GPUs that torch can use, {wanted} are needed")
        faults += gpu_faults(_nvidia_smi())
    return faults


def _disk_faults(run_dir: Path) -> Iterable[str]:
    place = run_dir
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield f"runtime.run_dir: {place} cannot be written; set another, or change its permissions"
    elif shutil.disk_usage(place).free < 64 << 20:
        free = shutil.disk_usage(place).free >> 20
        yield f"runtime.run_dir: {free} MiB are free in {place}, and at least 64 are needed; set another, or make room"


def _nvidia_smi() -> str:
    """One line per GPU: index, uncorrected memory errors since the driver was loaded, slowed by its hardware or not."""
    fields = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_faults(told: str) -> list[str]:
    """What `nvidia-smi` (see `_nvidia_smi`) says that keeps a GPU from taking part."""
    faults = []
    for line in told.splitlines():
        index, errors, slowed = (part.strip() for part in line.split(","))
        if errors.isdigit() and int(errors):
            faults.append(f"GPU {index} has had {errors} uncorrected memory errors; reset or replace it")
        if slowed == "Active":
            faults.append(f"GPU {index} is slowed down by its hardware (heat or power)")
    return faults


@dataclass(frozen=True)
class Measurement:
    """What one rank measured; times are seconds, the least of several."""

    rank: int
    host: str
    gemm_tflops: float
    product: int
    """Stands for the bits of a product of matrices that are the same on every rank."""
    all_reduce: float
    """Of one message over all ranks."""
    all_to_all: float
    """Within its expert-parallel group; 0 without one."""
    expert_group: list[int]
    pipeline: float
    """One message to the next stage and one from the stage before; 0 without stages."""
    next_stage: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def measure(device: str) -> list[Measurement]:
    """Computation and links as this run's groups use them, everyone's on every rank. Collective; about a second."""
    from megatron.core import parallel_state

    size = (64 << 20 if device == "cuda" else 1 << 20) // 4
    buffer = torch.ones(size, device=device)
    rank = dist.get_rank()
    dist.barrier()
    heartbeat.mark("pre-flight: matrix products")
    tflops, product = gemm_tflops(device), product_bits(device)
    heartbeat.mark("pre-flight: all-reduce of all ranks")
    dist.barrier()
    together = _least(device, lambda: dist.all_reduce(buffer))
    experts = parallel_state.get_expert_model_parallel_group()
    received = torch.empty_like(buffer)
    even = size // experts.size() * experts.size()
    heartbeat.mark("pre-flight: all-to-all of its expert-parallel group")
    to_all = (
        _least(device, lambda: dist.all_to_all_single(received[:even], buffer[:even], group=experts))
        if experts.size() > 1
        else 0.0
    )
    along, following = 0.0, rank
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        following = parallel_state.get_pipeline_model_parallel_next_rank()
        before = parallel_state.get_pipeline_model_parallel_prev_rank()
        heartbeat.mark(f"pre-flight: a message to rank {following} and one from rank {before}")

        def pass_on() -> None:
            operations = [dist.P2POp(dist.isend, buffer, following), dist.P2POp(dist.irecv, received, before)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        along = _least(device, pass_on)
    mine = Measurement(
        rank,
        platform.node(),
        tflops,
        product,
        together,
        to_all,
        dist.get_process_group_ranks(experts),
        along,
        following,
    )
    return exchange(Measurement, mine)


def gemm_tflops(device: str) -> float:
    """Rate of a square matrix product."""
    a = _square(device)
    return 2 * len(a) ** 3 / _least(device, lambda: a @ a, 5 if device == "cuda" else 50) / 1e12


def product_bits(device: str) -> int:
    """A sum of the bits of that product: alike on all GPUs of one kind, if they are sound."""
    a = _square(device)
    bits = (a @ a).view(torch.int16 if a.dtype is torch.bfloat16 else torch.int32)
    columns = bits.sum(0, dtype=torch.int64)
    return int((columns * torch.arange(1, len(columns) + 1, device=device)).sum())


def _square(device: str) -> torch.Tensor:
    """The same numbers on every rank: 8192, BF16, on a GPU; 256, FP32, on a CPU, whose cores ranks may share."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    return torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)


def _least(device: str, work: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def different(measured: list[Measurement]) -> list[str]:
    """Ranks that compute otherwise than most, in words: a GPU, or what compiled for it, may be at fault."""
    usual, _ = Counter(one.product for one in measured).most_common(1)[0]
    example = next(one for one in measured if one.product == usual)
    return [f"{one}: a matrix product has other bits than on {example}" for one in measured if one.product != usual]


def slow(measured: list[Measurement], factor: float) -> list[str]:
    """Ranks and links that take `factor` times the median of their kind, in words."""
    found = []
    usual = median(one.gemm_tflops for one in measured)
    found += [
        f"{one}: matrix products at {one.gemm_tflops:.3g} TFLOPS, {usual:.3g} are usual here"
        for one in measured
        if one.gemm_tflops * factor < usual
    ]
    # All of a group wait for its slowest: groups are compared with one another.
    groups = {tuple(one.expert_group): one.all_to_all for one in measured if one.all_to_all}
    for ranks, seconds in groups.items():
        if _stands_out(seconds, list(groups.values()), factor):
            found.append(
                f"expert-parallel group of ranks {_ranks(ranks)} on {_hosts(measured, ranks)}: all-to-all takes "
                f"{seconds * 1e3:.1f} ms, {median(groups.values()) * 1e3:.1f} are usual here"
            )
    passed = [one.pipeline for one in measured if one.pipeline]
    found += [
        f"from {one} to rank {one.next_stage}: a message takes {one.pipeline * 1e3:.1f} ms, "
        f"{median(passed) * 1e3:.1f} are usual here"
        for one in measured
        if one.pipeline and _stands_out(one.pipeline, passed, factor)
    ]
    return found


def _stands_out(seconds: float, others: list[float], factor: float) -> bool:
    usual = median(others)
    return seconds > factor * usual and seconds - usual > _LEAST_SECONDS


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 2 else " and ".join(map(str, ranks))


def _hosts(measured: list[Measurement], ranks: tuple[int, ...]) -> str:
    return ", ".join(dict.fromkeys(one.host for one in measured if one.rank in ranks))
