"""A trace as columns: what ran on each GPU, what the host launched and when, which ranges were named."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.errors import UserError
from dsv3_train.profiling.json_events import Events

_DEVICE = {"kernel": 0, "gpu_memcpy": 1, "gpu_memset": 2, "memcpy": 1, "memset": 2, "gpu_kernel": 0, "cuda_kernel": 0}
"""Category, in small letters -> index into `WHICH`. Kineto's, now and in 2021, and what others call them."""
WHICH = ("kernel", "memcpy", "memset")
_LAUNCHES = {"cuda_runtime", "cuda_driver", "runtime", "driver", "hip_runtime", "xpu_runtime", "hip_driver"}
_OPERATORS = {"cpu_op", "operator"}
_RANGES = {"user_annotation", "nvtx", "python_annotation"}
_GPU_RANGES = {"gpu_user_annotation"}
_STEP = re.compile(r"ProfilerStep#([0-9]{1,18})")


class Names:
    """Text -> number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[Any, int] = {}

    def of(self, text: Any) -> int:
        number = self._known.get(text)
        if number is None:
            number = self._known[text] = len(self.texts)
            self.texts.append(str(text))
        return number


class Columns:
    """Integer columns that grow row by row, then numpy arrays (int64 [n])."""

    def __init__(self, names: str) -> None:
        self.names = names.split()
        self.data = array("q")

    def add(self, *row: int) -> None:
        self.data.extend(row)

    def table(self) -> dict[str, np.ndarray]:
        rows = np.frombuffer(self.data, dtype=np.int64).reshape(-1, len(self.names)) if self.data else _none(self.names)
        return {name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(self.names)}


def _none(names: list[str]) -> np.ndarray:
    return np.zeros((0, len(names)), dtype=np.int64)


@dataclass
class Trace:
    """One file. Times are nanoseconds on the trace's own clock; names and streams are indices into their lists."""

    path: Path
    rank: int | None
    """As the file says in `distributedInfo`."""
    events: int
    names: list[str]
    streams: list[str]
    kernels: dict[str, np.ndarray]
    """start, end, name, stream, which (index into WHICH), device, correlation, external (-1: none), collective."""
    launches: dict[str, np.ndarray]
    """Runtime and driver calls with a correlation: start, end, name, thread, correlation."""
    operators: dict[str, np.ndarray]
    """start, end, name, thread, external, shape (index into `shapes`, -1: none)."""
    ranges: dict[str, np.ndarray]
    """Named by the user on the host: start, end, name, thread."""
    steps: dict[str, np.ndarray]
    """ProfilerStep#N: start, end, number."""
    of_gpu: tuple[bool, bool]
    """Whether ranges and steps are times of the GPU, as where the host's are not in the trace."""
    shapes: list[tuple[Any, Any]]
    """(Input Dims, Input type) of operators that multiply matrices."""
    notes: list[str] = field(default_factory=list)
    """What was left out, in words."""


def read(path: Path) -> Trace:
    """Read a trace of torch.profiler, or another Chrome trace.

    Raises:
        UserError: it is not one, or not whole.
    """
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.events = path, Events(path)
        self.names, self.streams, self.threads, self.shapes = Names(), Names(), Names(), Names()
        self.shape_values: list[tuple[Any, Any]] = []
        self.kernels = Columns("start end name stream which device correlation external collective")
        self.launches = Columns("start end name thread correlation")
        self.operators = Columns("start end name thread external shape")
        self.ranges = Columns("start end name thread")
        self.gpu_ranges = Columns("start end name thread")
        self.steps = Columns("start end number")
        self.gpu_steps = Columns("start end number")
        self.open: dict[tuple[Any, Any], list[dict]] = {}
        self.process_names: dict[Any, str] = {}
        self.thread_names: dict[tuple[Any, Any], str] = {}
        self.foreign: list[tuple[Any, Any, int, int, str]] = []
        """Complete events without a category known here."""
        self.kinds: Counter[str] = Counter()
        self.unusable = self.unmatched = 0
        self.none = self.names.of("")

    def read(self) -> Trace:
        kinds: dict[Any, str] = {}
        for event in self.events:
            phase = event.get("ph")
            if phase == "X":
                raw = event.get("cat")
                kind = kinds.get(raw) if raw.__hash__ else ""
                if kind is None:
                    kind = kinds[raw] = _kind(raw)
                if kind:
                    self._complete(kind, event)
            elif phase == "B":
                self.open.setdefault(_thread(event), []).append(event)
            elif phase == "E":
                self._close(event)
            elif phase == "M":
                self._metadata(event)
        self.unmatched += sum(map(len, self.open.values()))
        if not self.kernels.data:
            self._take_foreign()
        if not (self.kernels.data or self.operators.data):
            self._refuse()
        shared: dict[str, Any] = {"path": self.path, "rank": self._rank(), "events": self.events.count}
        ranges = self.ranges if self.ranges.data else self.gpu_ranges
        steps = self.steps if self.steps.data else self.gpu_steps
        return Trace(
            **shared,
            names=self.names.texts,
            streams=self.streams.texts,
            kernels=self.kernels.table(),
            launches=self.launches.table(),
            operators=self.operators.table(),
            ranges=ranges.table(),
            steps=steps.table(),
            of_gpu=(ranges is self.gpu_ranges, steps is self.gpu_steps),
            shapes=self.shape_values,
            notes=self._notes(),
        )

    def _complete(self, kind: str, event: dict) -> None:
        """One event with a beginning and a duration."""
        start, duration = _nanoseconds(event.get("ts")), _nanoseconds(event.get("dur", 0))
        if start is None or duration is None or duration < 0:
            self.unusable += 1
            return
        end, text = start + duration, event.get("name", "")
        name = self.names.of(text if text.__hash__ else str(text))
        args = event.get("args")
        if not isinstance(args, dict):
            args = {}
        if kind == "device":
            self._kernel(event, args, start, end, name)
            return
        text = self.names.texts[name]
        if (step := _STEP.fullmatch(text)) and kind in ("operator", "range", "gpu range"):
            (self.gpu_steps if kind == "gpu range" else self.steps).add(start, end, int(step[1]))
            return
        thread = self.threads.of(_thread(event))
        if kind == "launch":
            correlation = _integer(args.get("correlation"))
            if correlation >= 0:
                self.launches.add(start, end, name, thread, correlation)
        elif kind == "operator":
            shape, external = -1, _integer(args.get("External id", args.get("external id")))
            if "Input Dims" in args:
                shape = self._shape(text, args)
            self.operators.add(start, end, name, thread, external, shape)
        elif kind == "range":
            self.ranges.add(start, end, name, thread)
        elif kind == "gpu range":
            self.gpu_ranges.add(start, end, name, thread)
        else:
            self.foreign.append((*_thread(event), start, end, text))

    def _kernel(self, event: dict, args: dict, start: int, end: int, name: int) -> None:
        device = _integer(args.get("device", event.get("pid")))
        stream = args.get("stream", event.get("tid"))
        which = _DEVICE[str(event.get("cat")).lower().split(",")[0]] if event.get("cat") else 0
        collective = args.get("Collective name")
        self.kernels.add(
            start,
            end,
            name,
            self.streams.of(stream if stream.__hash__ else str(stream)),
            which,
            device,
            _integer(args.get("correlation")),
            _integer(args.get("External id", args.get("external id"))),
            self.names.of(f"{collective} {args.get('Process Group Name', '')}") if collective else self.none,
        )

    def _shape(self, name: str, args: dict) -> int:
        if not name.endswith(("mm", "matmul", "linear", "mm_")):
            return -1
        types = args.get("Input type", args.get("Input Types"))
        key = repr((args["Input Dims"], types))
        number = self.shapes.of(key)
        if number == len(self.shape_values):
            self.shape_values.append((args["Input Dims"], types))
        return number

    def _close(self, event: dict) -> None:
        """The end of a `B` event of its thread: the last one open, or the last one of its name."""
        waiting = self.open.get(_thread(event), [])
        wanted = event.get("name")
        for index in range(len(waiting) - 1, -1, -1):
            if wanted is None or waiting[index].get("name") == wanted:
                begun = waiting.pop(index)
                break
        else:
            self.unmatched += 1
            return
        start, end = _nanoseconds(begun.get("ts")), _nanoseconds(event.get("ts"))
        if start is None or end is None or end < start:
            self.unusable += 1
            return
        ours, theirs = begun.get("args"), event.get("args")
        args = {**(ours if isinstance(ours, dict) else {}), **(theirs if isinstance(theirs, dict) else {})}
        kind = _kind(begun.get("cat"))
        if kind:
            self._complete(kind, {**begun, "args": args, "dur": f"{end - start}e-3"})

    def _metadata(self, event: dict) -> None:
        args = event.get("args")
        name = args.get("name") if isinstance(args, dict) else None
        if event.get("name") == "process_name":
            self.process_names[_thread(event)[0]] = str(name)
        elif event.get("name") == "thread_name":
            self.thread_names[_thread(event)] = str(name)

    def _take_foreign(self) -> None:
        """Other tools' traces (XLA's, TensorFlow's): processes called after a GPU, whose threads are its streams; and
        those of PyTorch before Kineto, whose kernels are in a process `CUDA functions`."""
        devices = {pid: name for pid, name in self.process_names.items() if "gpu" in name.lower()}
        for pid, tid, start, end, text in self.foreign:
            thread = self.thread_names.get((pid, tid), str(tid))
            if pid == "CUDA functions" or (pid in devices and "stream" in thread.lower()):
                which = 2 if "memset" in text.lower() else 1 if text.lower().startswith("memcpy") else 0
                name = self.names.of(text)
                self.kernels.add(start, end, name, self.streams.of(thread), which, _integer(pid), -1, -1, self.none)

    def _refuse(self) -> None:
        if not self.events.count:
            raise UserError(f"{self.path}: the trace has no events")
        told = "none of a known category"
        if self.unusable:
            told = f"{self.unusable:,} of them without a usable ts or dur"
        raise UserError(
            f"{self.path}: no GPU work and no operators among {self.events.count:,} events ({told}); GPU work has "
            "the category kernel, gpu_memcpy or gpu_memset in torch.profiler's traces"
        )

    def _rank(self) -> int | None:
        info = self.events.header.get("distributedInfo")
        rank = info.get("rank") if isinstance(info, dict) else None
        return rank if isinstance(rank, int) and not isinstance(rank, bool) else None

    def _notes(self) -> list[str]:
        notes = []
        if self.unusable:
            notes.append(f"{self.unusable:,} events without a usable ts or dur were left out")
        if self.unmatched:
            notes.append(f"{self.unmatched:,} B or E events without their other half were left out")
        if self.events.unclosed:
            notes.append("the list of events is not closed: the trace may have been cut off between two events")
        return notes


def _kind(raw: Any) -> str:
    """What an event of a category is to us; empty: nothing."""
    if raw is None or raw == "":
        return "foreign"
    category = str(raw).lower().split(",")[0].strip()
    if category in _DEVICE:
        return "device"
    if category in _LAUNCHES:
        return "launch"
    if category in _OPERATORS:
        return "operator"
    if category in _RANGES:
        return "range"
    if category in _GPU_RANGES:
        return "gpu range"
    # What torch.profiler records besides, and Python's stack.
    known = ("python_function", "ac2g", "fwdbwd", "trace", "overhead", "cpu_instant_event", "async_cpu_to_gpu")
    return "" if category in known else "foreign"


def _thread(event: dict) -> tuple[Any, Any]:
    pid, tid = event.get("pid"), event.get("tid")
    return pid if pid.__hash__ else str(pid), tid if tid.__hash__ else str(tid)


def _integer(value: Any) -> int:
    """-1: none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return -1
    return number if -(1 << 62) < number < 1 << 62 else -1


def _nanoseconds(value: Any) -> int | None:
    """Of microseconds: an integer, or the text of a number; None for anything else."""
    if type(value) is int:
        return value * 1000 if abs(value) < 1 << 52 else None
    if type(value) is not str:
        return None
    whole, point, part = value.partition(".")
    if point and len(part) <= 3 and part.isdecimal() and whole.isdecimal() and len(whole) < 16:
        return int(whole) * 1000 + int(part.ljust(3, "0"))
    try:
        number = Decimal(value) * 1000
        return int(number.to_integral_value()) if abs(number) < 1 << 62 else None
    except (InvalidOperation, ValueError, OverflowError):
        return None
