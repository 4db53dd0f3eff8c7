"""The GPUs of a trace, each with what its own process did: a GPU is a process and a device of it, not a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.profiling.columns import Trace, by_number
from dsv3_train.profiling.values import LONGEST

_MOST, _MOST_STREAMS = 256, 4096
_SIDE_BY_SIDE, _OF_TIME = 0.4, 0.25
"""Part of a stream's kernels that begin while the one before runs, and of their time, from which on it is no stream.
Kernels with programmatic launches (Hopper and later) all begin so, but for little of their time."""
_FEWEST = 8
"""Kernels of a stream of which that may be said."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a trace; of a trace without any, one process."""

    trace: Trace
    """With the launches, operators, ranges and steps of its process alone."""
    process: str
    """By its pid, and by its name where the trace has one."""
    rank: int | None
    """As the trace or the name of its file says."""
    device: int | None
    """None: operators on a CPU."""
    kernels: dict[str, np.ndarray]
    """Those of the trace on this GPU, in order of their start; none of a stream overlaps the next one of it."""
    cut: tuple[int, int]
    """Kernels that were cut where the next one of their stream begins, and the nanoseconds of it."""


def gpus(trace: Trace) -> list[Gpu]:
    """Every GPU of a trace, in order of process and device; without kernels, every process with operators.

    Raises:
        UserError: kernels of several processes have the same numbers, or times are not to be believed.
    """
    if not len(trace.kernels["start"]):
        found = _without_gpu(trace)
        apart = True
    else:
        hosts = _hosts(trace)
        owners = _owners(trace, hosts)
        _bounded(trace, len(owners), "GPUs")
        found = [_gpu(trace, hosts, *owner) for owner in owners]
        # Kineto has the device for pid: so do several GPUs of one process look.
        apart = len(hosts) > 1 or any(trace.processes[process] != str(device) for process, device in trace.gpus)
    found.sort(key=lambda one: (_natural(one.process), one.device or 0))
    if len(found) == 1 or not apart:  # called after their process, from which its GPUs count
        first = trace.rank if trace.rank is not None else _rank_in(trace.path.name)
        return [replace(one, rank=None if first is None else first + number) for number, one in enumerate(found)]
    ranks = {one.rank for one in found}
    return found if len(ranks) == len(found) else [replace(one, rank=None) for one in found]


def _bounded(trace: Trace, count: int, what: str) -> None:
    if count > _MOST:
        raise UserError(
            f"{on_one_line(str(trace.path))}: work of {count:,} {what} in one trace; at most {_MOST:,} are analyzed"
        )


def _without_gpu(trace: Trace) -> list[Gpu]:
    processes = np.unique(trace.threads[trace.operators["thread"]]).tolist()
    _bounded(trace, len(processes), "processes")
    found = []
    for process in processes:
        mine = _of_process(trace, process, process) if len(processes) > 1 else trace
        at = f"{on_one_line(str(trace.path))}: process {_told(trace, process)}"
        _refuse_broken_times(mine.operators, at)
        threads = len(np.unique(mine.operators["thread"]))
        if threads > _MOST_STREAMS:
            raise UserError(f"{at}: operators on {threads:,} threads; at most {_MOST_STREAMS:,} are analyzed")
        found.append(Gpu(mine, _told(trace, process), _rank_of(trace, process), None, trace.kernels, (0, 0)))
    return found


def _refuse_broken_times(columns: dict[str, np.ndarray], at: str) -> None:
    apart = int(columns["end"].max()) - int(columns["start"].min())
    if apart > LONGEST:
        raise UserError(f"{at}: its events span {apart / 8.64e13:,.0f} days, so a time stamp is broken")


def _gpu(trace: Trace, hosts: list[int], gpu: int, owner: int | None, rows: np.ndarray) -> Gpu:
    process, device = trace.gpus[gpu]
    rows = rows[np.argsort(trace.kernels["start"][rows], kind="stable")]
    columns = {name: column[rows] for name, column in trace.kernels.items()}
    told = _told(trace, process if owner is None or len(hosts) < 2 else owner)
    at = f"{on_one_line(str(trace.path))}: GPU {device} of process {told}"
    columns["end"], cut = _without_overruns(trace, columns, at)
    _refuse_broken_times(columns, at)
    mine, notes = trace, []
    if len(hosts) > 1 or len(trace.gpus) > 1:
        mine = _of_process(trace, owner, process, several=len(hosts) > 1)
    if len(hosts) > 1 and owner is None:
        notes.append("the trace does not say which process launched this GPU's work: launches and steps are left out")
    if cut[0]:
        notes.append(
            f"{cut[0]:,} of {len(rows):,} kernels ran into the next kernel of their stream and were cut there, by "
            f"{cut[1] / 1e6:,.3f} ms in all"
        )
    if notes:
        mine = replace(mine, notes=[*mine.notes, *notes])
    return Gpu(mine, told, _rank_of(trace, process, owner), device, columns, cut)


def _without_overruns(trace: Trace, kernels: dict[str, np.ndarray], at: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Ends of the kernels, none of which lies behind the start of the next one of its stream; how many were cut, and
    by how much. A profiler may write an end too late, and kernels of one stream run one after the other (CUDA C++
    programming guide, section Streams)."""
    start, end, stream = kernels["start"], kernels["end"].copy(), kernels["stream"]
    used, stream = np.unique(stream, return_inverse=True)
    if len(used) > _MOST_STREAMS:
        raise UserError(f"{at}: kernels on {len(used):,} streams; at most {_MOST_STREAMS:,} are analyzed")
    order = np.lexsort((end, start, stream))
    before, after = order[:-1], order[1:]
    over = (stream[before] == stream[after]) & (end[before] > start[after])
    over &= ~np.isin(used, list(trace.loose))[stream[before]]
    before, limit = before[over], start[after[over]]
    lost = end[before] - limit

    def per_stream(streams: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.bincount(streams, of.astype(float), len(used))

    count = np.bincount(stream, minlength=len(used))
    share = np.bincount(stream[before], minlength=len(used)) / count
    of_time = per_stream(stream[before], lost) / np.maximum(1, per_stream(stream, end - start))
    worst = np.flatnonzero((count >= _FEWEST) & (share >= _SIDE_BY_SIDE) & (of_time >= _OF_TIME))
    if len(worst):
        raise UserError(
            f"{at}: {share[worst[0]]:.0%} of the kernels of stream {trace.streams[used[worst[0]]]} begin while the one "
            "before runs, which kernels of one stream cannot do; if traces of several ranks were merged under the same "
            "numbers, give one file per rank"
        )
    end[before] = limit
    return end, (len(before), int(lost.sum(dtype=float)))


def _hosts(trace: Trace) -> list[int]:
    """Processes that launch; where the trace has no launches, those with operators, ranges or steps."""
    for table, of_gpu in (
        (trace.launches, False),
        (trace.operators, False),
        (trace.ranges, trace.of_gpu[0]),
        (trace.steps, trace.of_gpu[1]),
    ):
        if len(table["thread"]) and not of_gpu:
            return np.unique(trace.threads[table["thread"]]).tolist()
    return []


def _owners(trace: Trace, hosts: list[int]) -> list[tuple[int, int | None, np.ndarray]]:
    """(GPU, process that launched its work, its kernels). A number that several processes use is several GPUs, where
    correlations tell them apart."""
    rows = by_number(trace.kernels["gpu"], len(trace.gpus))
    if len(hosts) < 2:
        return [(gpu, hosts[0] if hosts else None, mine) for gpu, mine in enumerate(rows)]
    _bounded(trace, len(hosts), "processes")
    launched = trace.launches["correlation"], trace.threads[trace.launches["thread"]]
    by, who = np.unique(np.stack(launched, axis=1), axis=0).T  # every correlation with each process that has it
    found: list[tuple[int, int | None, np.ndarray]] = []
    for gpu, mine in enumerate(rows):
        process, device = trace.gpus[gpu]
        if process in hosts:
            found.append((gpu, process, mine))
            continue
        correlation = trace.kernels["correlation"][mine]
        first = np.searchsorted(by, correlation)
        times = np.searchsorted(by, correlation, side="right") - first
        if (times <= 1).all() and times.any():
            of = np.where(times == 1, who[np.minimum(first, len(who) - 1)], -1)
            several = np.unique(of[of >= 0]).tolist()
            of[of < 0] = several[0]  # no launch known: with the first, as all is where there is one process
            found += [(gpu, host, mine[of == host]) for host in several]
        elif len(rows) < len(hosts) or _launched_twice(correlation):
            raise UserError(
                f"{on_one_line(str(trace.path))}: {len(hosts)} processes ({_told(trace, hosts[0])}, "
                f"{_told(trace, hosts[1])}{', ...' if len(hosts) > 2 else ''}) launch work, and it cannot be told "
                f"which of them launched the kernels of process {_told(trace, process)}, device {device}: traces of "
                "several ranks were merged under the same numbers; give one file per rank"
            )
        else:
            found.append((gpu, None, mine))
    return found


def _launched_twice(correlation: np.ndarray) -> bool:
    """Whether most launches have two kernels: of a process it would be one, but for CUDA graphs."""
    _, count = np.unique(correlation[correlation >= 0], return_counts=True)
    return bool(len(count)) and float(np.median(count)) >= 2


def _of_process(trace: Trace, host: int | None, process: int, several: bool = True) -> Trace:
    """With the host's columns of one process alone where there are several, and of ranges on GPUs those of this one."""

    def kept(table: dict[str, np.ndarray], of_gpu: bool = False) -> dict[str, np.ndarray]:
        if not (several or of_gpu):
            return table
        wanted = process if of_gpu else -1 if host is None else host
        mine = trace.threads[table["thread"]] == wanted
        return {name: column[mine] for name, column in table.items()}

    return replace(
        trace,
        launches=kept(trace.launches),
        operators=kept(trace.operators),
        ranges=kept(trace.ranges, trace.of_gpu[0]),
        steps=kept(trace.steps, trace.of_gpu[1]),
    )


def _told(trace: Trace, process: int) -> str:
    name = trace.process_names.get(process)
    pid = trace.processes[process][:100]
    return f"{pid} ({name})" if name and name != pid else pid


def _rank_of(trace: Trace, *processes: int | None) -> int | None:
    """The number behind `rank` in a process's name or pid."""
    for process in processes:
        if process is not None and (found := re.search(r"rank\W{0,3}(\d{1,9})", _told(trace, process).lower())):
            return int(found[1])
    return None


def _rank_in(name: str) -> int | None:
    """`rank3.json`, `trace_rank-3.json.gz`, `rank_3...`: 3."""
    found = re.search(r"rank[-_ ]?(\d{1,9})", name.lower())
    return int(found[1]) if found else None


def _natural(text: str) -> tuple:
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d{1,18}|\D+", text))
