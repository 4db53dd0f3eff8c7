"""A trace as columns: what ran on each GPU, what the host launched and when, which ranges were named."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.errors import on_one_line

WHICH = ("kernel", "memcpy", "memset")
_LONGEST_NAME = 20_000
"""Characters that are kept of a name."""


class Names:
    """Anything -> number, and that number -> text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.bytes = 0
        """About what they take."""
        self.known: dict[Hashable, int] = {}

    def of(self, key: Hashable, text: str | None = None) -> int:
        """Its number; `text` stands for it if it is not its own text."""
        number = self.known.get(key)
        if number is None:
            number = self.known[key] = len(self.texts)
            kept = on_one_line(str(key if text is None else text)[:_LONGEST_NAME])
            self.texts.append(kept)
            self.bytes += 250 + len(kept) + len(str(key))
        return number


class Columns:
    """Integer columns that grow row by row, then numpy arrays (int64 [n])."""

    def __init__(self, names: str) -> None:
        self.names = names.split()
        self.data = array("q")

    def __len__(self) -> int:
        return len(self.data) // len(self.names)

    def add(self, *row: int) -> None:
        self.data.extend(row)

    def table(self) -> dict[str, np.ndarray]:
        """Once: the rows are given away."""
        data, self.data = self.data, array("q")
        rows = np.frombuffer(data or b"", dtype=np.int64).reshape(-1, len(self.names))
        return {name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(self.names)}


@dataclass
class Trace:
    """One file, or what of it is of one process. Times are nanoseconds on the trace's own clock; names, streams,
    processes and GPUs are indices into their lists."""

    path: Path
    rank: int | None
    """As the file says in `distributedInfo`."""
    events: int
    names: list[str]
    streams: list[str]
    loose: frozenset[int]
    """Streams that are not streams but all of a GPU, on which kernels may run side by side."""
    processes: list[str]
    """By their pid."""
    process_names: dict[int, str]
    """What the file calls some of them."""
    gpus: list[tuple[int, int]]
    """(process, device): two processes may both have a device 0."""
    threads: np.ndarray
    """Process of every thread."""
    kernels: dict[str, np.ndarray]
    """start, end, name, stream, which (index into WHICH), gpu, correlation, external (-1: none), collective."""
    launches: dict[str, np.ndarray]
    """Runtime and driver calls with a correlation: start, end, name, thread, correlation."""
    operators: dict[str, np.ndarray]
    """start, end, name, thread, external, shape (index into `shapes`, -1: none)."""
    ranges: dict[str, np.ndarray]
    """Named by the user on the host: start, end, name, thread."""
    steps: dict[str, np.ndarray]
    """ProfilerStep#N: start, end, number, thread."""
    of_gpu: tuple[bool, bool]
    """Whether ranges and steps are times of the GPU, as where the host's are not in the trace."""
    shapes: list[Any]
    """Input Dims of operators that multiply matrices."""
    notes: list[str] = field(default_factory=list)
    """What was left out, in words."""


def by_number(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """Where each number below `count` occurs, in order: `count` arrays of indices."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.searchsorted(numbers[order], np.arange(1, count)))
