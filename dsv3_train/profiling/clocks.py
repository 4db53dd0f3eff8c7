"""How far the clocks of ranks are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_train.runtime.exchange import exchange

_ECHOES = 15


def machine() -> str:
    """The same for all processes that share this machine's monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import platform

        return platform.node()


def offsets(clock: Callable[[], float] = time.perf_counter, where: str | None = None) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's; exactly 0 on rank 0's machine. Collective.

    From the quickest of some echoes with rank 0, over gloo, so that no GPU is waited for: good to about half of that
    round trip.

    Args:
        where: the machine that this rank is on; None: found out.
    """
    group = dist.new_group(backend="gloo")
    me, world = dist.get_rank(), dist.get_world_size()
    machines = exchange(str, machine() if where is None else where, group)
    found = [0.0] * world
    for rank in range(1, world):
        if machines[rank] == machines[0]:
            continue
        if me == 0:
            found[rank] = _asked(rank, clock, group)
        elif me == rank:
            _answer(clock, group)
    told = torch.tensor(found, dtype=torch.float64)
    dist.broadcast(told, 0, group=group)
    dist.destroy_process_group(group)
    return told.tolist()


def _asked(rank: int, clock: Callable[[], float], group: dist.ProcessGroup) -> float:
    answers = []
    time_there = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ECHOES):
        start = clock()
        dist.send(time_there, rank, group=group)
        dist.recv(time_there, rank, group=group)
        end = clock()
        answers.append((end - start, float(time_there) - (start + end) / 2))
    answers.sort()
    return statistics.median(offset for _, offset in answers[:3])


def _answer(clock: Callable[[], float], group: dist.ProcessGroup) -> None:
    now = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ECHOES):
        dist.recv(now, 0, group=group)
        now[0] = clock()
        dist.send(now, 0, group=group)
