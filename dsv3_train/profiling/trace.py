"""The reader of traces: events of torch.profiler, and of other tools, into columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.errors import UserError, on_one_line
from dsv3_train.profiling.classes import which_by_name
from dsv3_train.profiling.columns import WHICH, Columns, Names, Trace
from dsv3_train.profiling.json_events import Events
from dsv3_train.profiling.values import LONGEST, integer, nanoseconds, scalar

_DEVICE = {
    "kernel": "kernel", "gpu_kernel": "kernel", "cuda_kernel": "kernel",
    "gpu_memcpy": "memcpy", "memcpy": "memcpy", "gpu_memset": "memset", "memset": "memset",
}  # fmt: skip
"""Category, in small letters -> one of `WHICH`. Kineto's, now and in 2021, and what others call them."""
_LAUNCHES = {"cuda_runtime", "cuda_driver", "runtime", "driver", "hip_runtime", "xpu_runtime", "hip_driver"}
_OPERATORS = {"cpu_op", "operator"}
_RANGES = {"user_annotation", "nvtx", "python_annotation"}
_GPU_RANGES = {"gpu_user_annotation"}
_STEP = re.compile(r"ProfilerStep#([0-9]{1,18})")
_MOST_BYTES = 1 << 30
"""Of what is kept of a trace: about 15 million kernels."""
_MOST_OPEN = 100_000
"""`B` events without their `E`, at any time."""
_MOST_NAMED = 100_000
"""Processes, and threads, that have a name."""
_ARGS = (
    "device", "stream", "context", "correlation", "External id", "external id", "kind", "Collective name",
    "Process Group Name",
)  # fmt: skip
"""What a `B` event keeps of its arguments."""
_DEEPEST = 64
"""Open events of a thread among which the name of an `E` is looked for."""


def read(path: Path) -> Trace:
    """Read a trace of torch.profiler, or another Chrome trace.

    Raises:
        UserError: it is not one, not whole, or larger than is kept in memory.
    """
    return _Reader(path).read()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.told, self.events = path, on_one_line(str(path)), Events(path)
        self.names, self.streams, self.processes = Names(), Names(), Names()
        self.threads: dict[tuple[int, Any], int] = {}
        self.thread_process: list[int] = []
        self.gpu_numbers: dict[tuple[int, Any], int] = {}
        self.gpus: list[tuple[int, int]] = []
        self.contexts: dict[tuple[int, Any], Any] = {}
        """(GPU, stream) -> the context where it was seen first: another one has other streams of the same numbers."""
        self.loose: set[int] = set()
        self.by_name: dict[int, str] = {}
        """Name -> kernel, memcpy or memset, going by it."""
        self.shapes: dict[Any, int] = {}
        self.kernels = Columns("start end name stream which gpu correlation external collective")
        self.launches = Columns("start end name thread correlation")
        self.operators = Columns("start end name thread external shape")
        self.ranges = Columns("start end name thread")
        self.gpu_ranges = Columns("start end name thread")
        self.steps = Columns("start end number thread")
        self.gpu_steps = Columns("start end number thread")
        self.foreign = Columns("start end name thread")
        """Complete events without a category known here."""
        self.open: dict[int, list[tuple[Any, ...]]] = {}
        self.opened = 0
        self.process_names: dict[int, set[str]] = {}
        self.thread_names: dict[int, str] = {}
        self.unusable = self.unmatched = 0
        self.none = self.names.of("")

    def read(self) -> Trace:
        kinds: dict[Any, str] = {}
        for event in self.events:
            phase = event.get("ph")
            if phase == "X":
                raw = scalar(event.get("cat"))
                kind = kinds.get(raw)
                if kind is None:
                    kind = _kind(raw)
                    if len(kinds) < _MOST_NAMED:
                        kinds[raw] = kind
                if kind:
                    args = event.get("args")
                    start, duration = nanoseconds(event.get("ts")), nanoseconds(event.get("dur"))
                    self._complete(kind, event, args if isinstance(args, dict) else {}, start, duration)
            elif phase == "B":
                self._begin(event)
            elif phase == "E":
                self._close(event)
            elif phase == "M":
                self._metadata(event)
            if not self.events.count & 0xFFFF:
                self._refuse_too_much()
        self.unmatched += self.opened
        if not len(self.kernels):
            self._take_foreign()
        if not (len(self.kernels) or len(self.operators)):
            self._refuse()
        ranges = self.ranges if len(self.ranges) else self.gpu_ranges
        steps = self.steps if len(self.steps) else self.gpu_steps
        self._refuse_shared_numbers()
        return Trace(
            path=self.path,
            rank=self._rank(),
            events=self.events.count,
            names=self.names.texts,
            streams=self.streams.texts,
            loose=frozenset(self.loose),
            processes=self.processes.texts,
            process_names={process: min(names) for process, names in self.process_names.items()},
            gpus=self.gpus,
            threads=np.array(self.thread_process, dtype=np.int64),
            kernels=self.kernels.table(),
            launches=self.launches.table(),
            operators=self.operators.table(),
            ranges=ranges.table(),
            steps=steps.table(),
            of_gpu=(ranges is self.gpu_ranges, steps is self.gpu_steps),
            shapes=list(self.shapes),
            notes=self._notes(),
        )

    def _complete(self, kind: str, event: dict, args: dict, start: int | None, duration: int | None) -> None:
        """One event with a beginning and a duration."""
        if start is None or duration is None or not 0 <= duration <= LONGEST:
            self.unusable += 1
            return
        end, text = start + duration, scalar(event.get("name", ""))
        name = self.names.of("" if text is None else text)
        if kind in WHICH:
            self._kernel(kind, event, args, start, end, name)
            return
        text, thread = self.names.texts[name], self._thread(event)
        if (step := _STEP.fullmatch(text)) and kind in ("operator", "range", "gpu range"):
            (self.gpu_steps if kind == "gpu range" else self.steps).add(start, end, int(step[1]), thread)
            return
        if kind == "launch":
            correlation = integer(args.get("correlation"))
            if correlation >= 0:
                self.launches.add(start, end, name, thread, correlation)
        elif kind == "operator":
            shape, external = -1, integer(args.get("External id", args.get("external id")))
            if "Input Dims" in args:
                shape = self._shape(text, args["Input Dims"])
            self.operators.add(start, end, name, thread, external, shape)
        elif kind == "range":
            self.ranges.add(start, end, name, thread)
        elif kind == "gpu range":
            self.gpu_ranges.add(start, end, name, thread)
        else:
            self.foreign.add(start, end, name, thread)

    def _kernel(self, kind: str, event: dict, args: dict, start: int, end: int, name: int) -> None:
        process = self._process(event)
        gpu = self._gpu(process, args.get("device", event.get("pid")))
        text = self.names.texts[name]
        by_name = self.by_name.get(name)
        if by_name is None:
            by_name = self.by_name[name] = which_by_name(text)
        if kind == "kernel":
            kind = by_name  # some tools have the category kernel for all that a GPU does
        elif kind == "memcpy" and by_name == "kernel" and isinstance(told := args.get("kind"), str):
            name = self.names.of(f"{text} ({told})")  # AMD's say there which way
        stream = scalar(args.get("stream", event.get("tid")))
        collective = scalar(args.get("Collective name"))
        self.kernels.add(
            start,
            end,
            name,
            self._stream(gpu, scalar(args.get("context")), stream),
            WHICH.index(kind),
            gpu,
            integer(args.get("correlation")),
            integer(args.get("External id", args.get("external id"))),
            self.names.of(f"{collective} {scalar(args.get('Process Group Name')) or ''}") if collective else self.none,
        )

    def _gpu(self, process: int, device: Any) -> int:
        number = integer(device)
        key = process, scalar(device) if number < 0 else number
        gpu = self.gpu_numbers.get(key)
        if gpu is None:
            gpu = self.gpu_numbers[key] = len(self.gpus)
            self.gpus.append((process, number))
        return gpu

    def _stream(self, gpu: int, context: Any, stream: Any) -> int:
        number = self.streams.known.get((gpu, context, stream))
        if number is not None:
            return number
        first = self.contexts.setdefault((gpu, stream), context)
        text = str(stream) if context == first else f"{stream} (context {context})"
        return self.streams.of((gpu, context, stream), text)

    def _shape(self, name: str, dims: Any) -> int:
        if not name.endswith(("mm", "matmul", "linear", "mm_")) or not isinstance(dims, list):
            return -1
        # Those of three operands: of no more than 8 dimensions, each below 2^31.
        sides = [side if isinstance(side, list) and len(side) <= 8 else [] for side in dims[:3]]
        if not all(type(size) is int and 0 <= size < 1 << 31 for side in sides for size in side):
            return -1
        return self.shapes.setdefault(tuple(map(tuple, sides)), len(self.shapes))

    def _begin(self, event: dict) -> None:
        self.opened += 1
        if self.opened > _MOST_OPEN:
            raise UserError(
                f"{self.told}: more than {_MOST_OPEN:,} events are open at once, `B` without `E`: no trace of a program"
            )
        # What is needed of it, and no more: it may be open for long.
        kept: dict[str, Any] = {key: scalar(event.get(key)) for key in ("cat", "name", "pid", "tid")}
        args = event.get("args")
        kept["args"] = {key: scalar(args.get(key)) for key in _ARGS if key in args} if isinstance(args, dict) else {}
        waiting = self.open.setdefault(self._thread(event), [])
        waiting.append((kept["name"], nanoseconds(event.get("ts")), kept))

    def _close(self, event: dict) -> None:
        """The end of a `B` event of its thread: the last one open, or the last one of its name."""
        waiting = self.open.get(self._thread(event), [])
        wanted = scalar(event.get("name"))
        for index in range(len(waiting) - 1, max(-1, len(waiting) - 1 - _DEEPEST), -1):
            if wanted is None or waiting[index][0] == wanted:
                _, start, begun = waiting.pop(index)
                self.opened -= 1
                break
        else:
            self.unmatched += 1
            return
        end = nanoseconds(event.get("ts"))
        kind = _kind(begun["cat"])
        if kind:
            theirs = event.get("args")
            args = {**begun["args"], **(theirs if isinstance(theirs, dict) else {})}
            self._complete(kind, begun, args, start, None if start is None or end is None else end - start)

    def _metadata(self, event: dict) -> None:
        args = event.get("args")
        name = scalar(args.get("name")) if isinstance(args, dict) else None
        if name is None:
            return
        if event.get("name") == "process_name" and len(self.process_names) < _MOST_NAMED:
            names = self.process_names.setdefault(self._process(event), set())
            if len(names) < 2:
                names.add(on_one_line(str(name)[:200]))
        elif event.get("name") == "thread_name" and len(self.thread_names) < _MOST_NAMED:
            self.thread_names[self._thread(event)] = on_one_line(str(name)[:200])

    def _process(self, event: dict) -> int:
        return self.processes.of(scalar(event.get("pid")))

    def _thread(self, event: dict) -> int:
        process, tid = self._process(event), scalar(event.get("tid"))
        number = self.threads.get((process, tid))
        if number is None:
            number = self.threads[process, tid] = len(self.threads)
            self.thread_process.append(process)
        return number

    def _take_foreign(self) -> None:
        """Other tools' traces (XLA's, TensorFlow's): processes called after a GPU, whose threads are its streams; and
        those of PyTorch before Kineto, whose kernels are in a process `CUDA functions`, each device a thread."""
        tids = {number: tid for (_, tid), number in self.threads.items()}
        rows = self.foreign.table()
        for start, end, name, thread in zip(*(column.tolist() for column in rows.values()), strict=True):
            process = self.thread_process[thread]
            pid = self.processes.texts[process]
            of_torch = pid == "CUDA functions"
            called = self.thread_names.get(thread, str(tids[thread]))
            if not of_torch and not ("stream" in called.lower() and self._is_gpu(process)):
                continue
            gpu = self._gpu(process, tids[thread] if of_torch else pid)
            stream = self.streams.of((gpu, thread), "all streams" if of_torch else called)
            if of_torch:
                self.loose.add(stream)
            which = WHICH.index(which_by_name(self.names.texts[name]))
            self.kernels.add(start, end, name, stream, which, gpu, -1, -1, self.none)

    def _is_gpu(self, process: int) -> bool:
        return any("gpu" in name.lower() for name in self.process_names.get(process, ()))

    def _refuse_too_much(self) -> None:
        columns = (
            self.kernels, self.launches, self.operators, self.ranges, self.gpu_ranges, self.steps, self.gpu_steps,
            self.foreign,
        )  # fmt: skip
        kept = 8 * sum(len(one.data) for one in columns) + sum(
            one.bytes for one in (self.names, self.streams, self.processes)
        )
        kept += 250 * (len(self.threads) + len(self.gpus) + len(self.contexts) + len(self.shapes))
        if kept > _MOST_BYTES:
            raise UserError(
                f"{self.told}: the trace is too large: its first {self.events.count:,} events take more than "
                f"{_MOST_BYTES >> 30} GiB; record fewer steps"
            )

    def _refuse(self) -> None:
        if not self.events.count:
            raise UserError(f"{self.told}: the trace has no events")
        told = "none of a known category"
        if self.unusable:
            told = f"{self.unusable:,} of them without a usable ts or dur"
        raise UserError(
            f"{self.told}: no GPU work and no operators among {self.events.count:,} events ({told}); GPU work has "
            "the category kernel, gpu_memcpy or gpu_memset in torch.profiler's traces"
        )

    def _refuse_shared_numbers(self) -> None:
        """Two processes' traces under one pid: no figure of theirs could be told apart."""
        for process in sorted({process for process, _ in self.gpus}):
            names = sorted(self.process_names.get(process, ()))
            if len(names) > 1:
                raise UserError(
                    f"{self.told}: pid {self.processes.texts[process]} is two processes ({names[0]!r}, {names[1]!r}): "
                    "traces were merged under the same numbers; give one file per rank"
                )

    def _rank(self) -> int | None:
        info = self.events.header.get("distributedInfo")
        rank = info.get("rank") if isinstance(info, dict) else None
        return rank if type(rank) is int and 0 <= rank < 1 << 31 else None

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
        return _DEVICE[category]
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
