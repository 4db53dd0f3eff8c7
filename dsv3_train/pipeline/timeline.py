"""When each operation of a schedule ran: what the pipeline picture and the measured bubble are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from dsv3_train.pipeline.operations import Op, name_in_trace
from dsv3_train.pipeline.simulate import Span


class Timeline:
    """Records the computations of one global batch, with two clock readings (or CUDA events) each."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._marks: list[tuple] = []
        self._origin = self._mark()
        self._origin_seconds = time.perf_counter()

    @contextmanager
    def span(self, ops: tuple[Op, ...]) -> Iterator[None]:
        """What runs within is `ops`; in a trace, a range of that name."""
        traced = torch.autograd._profiler_enabled()
        start = self._mark()
        with torch.profiler.record_function(name_in_trace(ops)) if traced else nullcontext():
            yield
        self._marks.append((start, self._mark(), ops))

    def spans(self) -> tuple[Span, ...]:
        """All computations in order, in seconds on this machine's `perf_counter`. Waits for the device."""
        if not self._cuda:
            return tuple(Span(*mark) for mark in self._marks)
        torch.cuda.synchronize()

        def seconds(event: torch.cuda.Event) -> float:
            return self._origin_seconds + self._origin.elapsed_time(event) / 1e3

        return tuple(Span(seconds(start), seconds(end), ops) for start, end, ops in self._marks)

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
