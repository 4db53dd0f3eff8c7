"""What each rank is doing, where every other process of the run can see it: RUN_DIR/heartbeats/RANK.

A rank's main thread marks what it begins (`mark`, about a microsecond), its watchdog's thread that the process is
alive at all. The file is mapped into memory: what a rank did last can be read when it was killed or stopped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_MARK = struct.Struct("<qdq112s")  # marks so far, time of the last, step, operation
_BEAT = struct.Struct("<dqq?64s136s")  # time, rank, process, waits for others, host, place in the code
_SIZE = _MARK.size + _BEAT.size


@dataclass(frozen=True)
class Beat:
    """A rank as its file shows it."""

    rank: int
    host: str
    process: int
    step: int
    """The step it is in, from 1; 0 before the first."""
    operation: str
    """What it began last, as `forward of micro-batch 3`."""
    marks: int
    """How many operations it has begun."""
    since: float
    """When it began that (seconds since the epoch, its machine's clock)."""
    alive: float
    """When its watchdog's thread last ran."""
    waiting: bool
    """Whether it was then inside communication."""
    where: str
    """The innermost place of its main thread in the code then."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process}), step {self.step}, {self.operation}"


class Heartbeat:
    """This rank's file."""

    def __init__(self, directory: Path | None, rank: int) -> None:
        """Start at step 0. Without a directory, or where that cannot be written, only this process sees it."""
        self.rank, self.step, self.operation, self.marks, self.since = rank, 0, "start", 0, time.time()
        self._host = platform.node().encode()
        self.began = time.monotonic()
        """When the last mark was made, by a clock that nobody sets."""
        self._map, self._file = mmap.mmap(-1, _SIZE), -1
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                path = directory / str(rank)
                path.write_bytes(bytes(_SIZE))  # space that is there: a full disk must not end a later write to memory
                file = os.open(path, os.O_RDWR)
                self._map, self._file = mmap.mmap(file, _SIZE), file
            except OSError:
                pass
        self.mark("start")
        self.beat(False, "")

    def mark(self, operation: str, step: int | None = None) -> None:
        """The main thread begins `operation`."""
        if step is not None:
            self.step = step
        self.operation, self.since, self.began = operation, time.time(), time.monotonic()
        self.marks += 1
        _MARK.pack_into(self._map, 0, self.marks, self.since, self.step, operation.encode()[:112])

    def beat(self, waiting: bool, where: str) -> None:
        """The process is alive, its main thread at `where`."""
        _BEAT.pack_into(
            self._map, _MARK.size, time.time(), self.rank, os.getpid(), waiting, self._host[:64], where.encode()[:136]
        )
        if self._file >= 0:
            # Not `mmap.flush`, which keeps Python's lock, and so training, until a shared file system has answered.
            with contextlib.suppress(OSError):  # nobody else sees this beat; the next one may be seen
                os.fsync(self._file)


def read(path: Path) -> Beat | None:
    """What a rank's file says; None where there is none yet."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _SIZE:
        return None
    marks, since, step, operation = _MARK.unpack_from(data)
    alive, rank, process, waiting, host, where = _BEAT.unpack_from(data, _MARK.size)
    if not alive:
        return None
    texts = [text.rstrip(b"\0").decode(errors="replace") for text in (host, operation, where)]
    return Beat(rank, texts[0], process, step, texts[1], marks, since, alive, waiting, texts[2])


_mine: Heartbeat | None = None


def start(directory: Path | None, rank: int) -> Heartbeat:
    """Begin this process's heartbeat; `mark` writes to it from now on."""
    global _mine
    _mine = Heartbeat(directory, rank)
    return _mine


def mark(operation: str, step: int | None = None) -> None:
    """Tell what this rank begins; nothing where no heartbeat was started."""
    if _mine is not None:
        _mine.mark(operation, step)
