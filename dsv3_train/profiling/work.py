"""What one rank did: its kernels with their classes, and the sets of time that they cover."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.profiling.classes import COMMUNICATION, UNCLASSIFIED, Table
from dsv3_train.profiling.columns import WHICH, Trace
from dsv3_train.profiling.gpus import Gpu, gpus
from dsv3_train.profiling.intervals import Intervals, union


@dataclass
class Work:
    """Kernels, copies and memsets of one GPU in order of their start; of a trace without any, its host's operators.

    Arrays are int64 [n], times in nanoseconds on the trace's clock.
    """

    trace: Trace
    """What of it is of this rank's process."""
    rank: int
    process: str
    """By its pid, and by its name where the trace has one."""
    device: int | None
    """None: a CPU's operators, each thread a stream; an operator counts while none that it called runs."""
    start: np.ndarray
    end: np.ndarray
    name: np.ndarray
    stream: np.ndarray
    """Index into `streams`."""
    which: np.ndarray
    cls: np.ndarray
    """Index into `classes`."""
    launch: np.ndarray
    """Row of `trace.launches` that launched it; -1: not known."""
    operator: np.ndarray
    """Row of `trace.operators` by the kernel's external id (of a CPU's operator: itself); -1: not known."""
    collective: np.ndarray
    classes: list[tuple[str, str]]
    """(class, kind)."""
    streams: list[str]
    cut: tuple[int, int]
    """Kernels that were cut where the next one of their stream begins, and the nanoseconds of it."""

    @property
    def on_gpu(self) -> bool:
        return self.device is not None

    @cached_property
    def is_comm(self) -> np.ndarray:
        kinds = np.array([kind == COMMUNICATION for _, kind in self.classes] or [False])
        return kinds[self.cls]

    @cached_property
    def compute(self) -> Intervals:
        return union(self.start[~self.is_comm], self.end[~self.is_comm])

    @cached_property
    def comm(self) -> Intervals:
        return union(self.start[self.is_comm], self.end[self.is_comm])

    @cached_property
    def exposed(self) -> Intervals:
        """When there is communication and no compute."""
        return self.comm - self.compute

    @cached_property
    def idle(self) -> Intervals:
        return (self.compute | self.comm).gaps(self.first, self.last)

    @property
    def first(self) -> int:
        """When the first kernel starts."""
        return int(self.start[0])

    @cached_property
    def last(self) -> int:
        """When the last kernel ends."""
        return int(self.end.max())

    def class_name(self, kernel: int) -> str:
        return self.classes[self.cls[kernel]][0]

    def text(self, kernel: int) -> str:
        """A kernel's name."""
        return self.trace.names[self.name[kernel]]

    def launched(self) -> np.ndarray:
        """When the host launched each kernel [n]; where that is not known, when it started."""
        if not len(self.trace.launches["start"]):
            return self.start
        return np.where(self.launch >= 0, self.trace.launches["start"][self.launch], self.start)


def works(traces: list[Trace], table: Table) -> list[Work]:
    """One per rank, in order of rank. A file with kernels of several GPUs is several ranks.

    Raises:
        UserError: two files are of the same rank, or a trace's numbers are no GPUs and streams.
    """
    found = [gpu for trace in traces for gpu in gpus(trace)]
    ranks = [gpu.rank for gpu in found]
    numbers = [rank for rank in ranks if rank is not None]
    if len(numbers) < len(found):
        numbers = list(range(len(found)))
    seen: dict[int, Gpu] = {}
    for number, gpu in zip(numbers, found, strict=True):
        if number in seen:
            paths = [on_one_line(str(one.trace.path)) for one in (seen[number], gpu)]
            raise UserError(f"{paths[0]} and {paths[1]}: both are of rank {number}; give one trace of each rank")
        seen[number] = gpu
    chosen = [
        _of_operators(gpu, rank, table) if gpu.device is None else _of_device(gpu, rank, gpu.device, table)
        for rank, gpu in seen.items()
    ]
    return sorted(chosen, key=lambda work: work.rank)


def _of_device(gpu: Gpu, rank: int, device: int, table: Table) -> Work:
    trace, columns = gpu.trace, gpu.kernels
    streams, stream = _used(trace.streams, columns["stream"])
    correlation, external = columns["correlation"], columns["external"]
    launch = _rows_of(trace.launches["correlation"], correlation)
    # Some traces put the correlation into the external id, which then is no operator's.
    external = np.where(external == correlation, -1, external)
    cls, classes = _classify(table, trace, columns["name"], columns["which"], columns["collective"])
    return Work(
        trace=trace,
        rank=rank,
        process=gpu.process,
        device=device,
        cut=gpu.cut,
        start=columns["start"],
        end=columns["end"],
        name=columns["name"],
        stream=stream,
        which=columns["which"],
        cls=cls,
        launch=launch,
        operator=_rows_of(trace.operators["external"], external),
        collective=columns["collective"],
        classes=classes,
        streams=[f"stream {name}" if name.lstrip("-").isdigit() else name for name in streams],
    )


def _of_operators(gpu: Gpu, rank: int, table: Table) -> Work:
    """Operators of each thread, cut where one calls another: what remains is each one's own time."""
    trace = gpu.trace
    columns = trace.operators
    thread, start, end = columns["thread"], columns["start"], columns["end"]
    order = np.lexsort((-end, start, thread))
    pieces: list[tuple[int, int, int]] = []
    stack: list[int] = []
    now = 0
    starts, ends, threads = start.tolist(), end.tolist(), thread.tolist()

    def until(time: int) -> None:
        nonlocal now
        while stack and ends[stack[-1]] <= time:
            row = stack.pop()
            if ends[row] > now:
                pieces.append((now, ends[row], row))
                now = ends[row]
        if stack and time > now:
            pieces.append((now, time, stack[-1]))
            now = time

    last_thread = None
    for row in order.tolist():
        if threads[row] != last_thread:
            until(1 << 62)
            last_thread, now = threads[row], starts[row]
        until(starts[row])
        now = max(now, starts[row])
        stack.append(row)
    until(1 << 62)
    if not pieces:
        pieces = [(int(start[0]), int(end[0]), 0)]
    cut = np.array(sorted(pieces), dtype=np.int64)
    rows = cut[:, 2]
    busy = np.zeros(int(thread.max()) + 1)
    np.add.at(busy, thread[rows], cut[:, 1] - cut[:, 0])
    order = np.argsort(-busy, kind="stable")  # there are many threads, and one or two that matter
    place = np.argsort(order, kind="stable")
    names, stream = [f"thread {number}" for number in order[busy[order] > 0]], place[thread[rows]]
    none = np.full(len(rows), -1, dtype=np.int64)
    cls, classes = _classify(table, trace, columns["name"][rows], none, np.zeros_like(none), cpu=True)
    return Work(
        trace=trace,
        rank=rank,
        process=gpu.process,
        device=None,
        cut=gpu.cut,
        start=cut[:, 0],
        end=cut[:, 1],
        name=columns["name"][rows],
        stream=stream,
        which=none,
        cls=cls,
        launch=none,
        operator=rows,
        collective=np.zeros_like(none),
        classes=classes,
        streams=names,
    )


def _used(names: list[str], numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names that occur, in order of number where they are numbers, and `numbers` as indices into them."""
    kept, inverse = np.unique(numbers, return_inverse=True)
    texts = [names[number] for number in kept]
    order = sorted(range(len(texts)), key=lambda i: (not texts[i].isdigit(), texts[i].zfill(20)))
    place = np.empty(len(texts), dtype=np.int64)
    place[order] = np.arange(len(texts))
    return [texts[i] for i in order], place[inverse]


def _rows_of(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row of `keys` that holds each of `wanted`; -1: none, or wanted is -1. Of several, the first."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    at = np.minimum(np.searchsorted(ordered, wanted), len(keys) - 1)
    return np.where((ordered[at] == wanted) & (wanted >= 0), order[at], -1)


def _classify(
    table: Table, trace: Trace, names: np.ndarray, which: np.ndarray, collectives: np.ndarray, cpu: bool = False
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Class of each kernel: every name is looked up once."""
    keys, inverse = np.unique(np.stack([names, which, collectives], axis=1), axis=0, return_inverse=True)
    known: dict[tuple[str, str], int] = {}
    of_key = np.empty(len(keys), dtype=np.int64)
    for number, (name, kind, collective) in enumerate(keys.tolist()):
        what = trace.names[collective].split(" ")[0] if collective else ""
        found = table.classify("cpu" if cpu else WHICH[kind], trace.names[name], what)
        of_key[number] = known.setdefault(found, len(known))
    return of_key[inverse.reshape(-1)], list(known)


def is_unclassified(work: Work) -> np.ndarray:
    """Which kernels no rule knows."""
    return np.array([name == UNCLASSIFIED for name, _ in work.classes] or [False])[work.cls]
