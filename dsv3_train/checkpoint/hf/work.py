"""Long writing that is whole or absent at its end, and goes on where it was when it was cut short."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_train import locks
from dsv3_train.errors import FULL, UserError
from dsv3_train.runtime.workers import each, pool

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), the latter two in bytes."""
MOST_WORKERS = 8
BLOCK_VALUES = 1 << 24
"""Values that a worker holds at once, at most: larger tensors go by rows."""
WORKER_BYTES = 640 << 20
"""What a worker takes beyond the interpreter and torch, at most; measured in tests/test_convert_memory.py."""
_SMALL = 1 << 28  # bytes; below, starting workers takes longer than the work
_RECORDS = ".records"


@dataclass(frozen=True)
class Unit:
    """What one task writes, and records when it is whole."""

    number: int
    nbytes: int
    task: tuple
    """Arguments for the function that writes it, after the directory."""


def worker_count(asked: int | None, nbytes: int) -> int:
    """Processes: as asked, else one per core where there is enough to do; at most MOST_WORKERS, for memory's sake."""
    if asked is None:
        asked = 1 if nbytes < _SMALL else len(os.sched_getaffinity(0))
    return min(asked, MOST_WORKERS)


@contextlib.contextmanager
def unfinished(target: Path, plan: Any) -> Iterator[Path]:
    """TARGET.unfinished, locked, which becomes TARGET at the end.

    What was begun with another plan is refused. After a fault of the input nothing stays; cut short, or with a full
    disk, what is whole stays for the next time.

    Raises:
        UserError: the target exists or cannot be written, or another process is at it.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; remove it, or choose another target")
    where = target.with_name(target.name + ".unfinished")
    try:
        where.mkdir(parents=True, exist_ok=True)
        lock = open(where / ".lock", "w")  # noqa: SIM115  held until the end
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); choose another target") from None
    with lock:
        if not locks.alone(lock):
            raise UserError(f"{where}: another process is converting; wait for it")
        _same_plan(where, hashlib.sha256(repr(plan).encode()).hexdigest())
        try:
            yield where
        except BaseException as error:
            told = error if isinstance(error, UserError) else _told(where, error)
            resumable = not isinstance(told, UserError) or isinstance(told, Interrupted)
            if not (resumable and any((where / _RECORDS).glob("*.json"))):
                locks.remove(where, lock)
            if told is None or told is error:
                raise
            raise told from None
        shutil.rmtree(where / _RECORDS)
        lock.close()  # NFS keeps what is open
        (where / ".lock").unlink()
        where.rename(target)


class Interrupted(UserError):
    """No fault of the input: what is whole stays, and the same command goes on."""


def _same_plan(where: Path, digest: str) -> None:
    records = where / _RECORDS
    file = records / "plan"
    if file.is_file() and file.read_text() != digest:
        raise UserError(f"{where}: left by a conversion of other files or options; remove it to begin anew")
    records.mkdir(exist_ok=True)
    if not file.is_file():
        file.write_text(digest)


def run(
    where: Path, function: Callable[..., Any], units: Sequence[Unit], workers: int, progress: Progress, stage: str
) -> list[Any]:
    """`function(where, *task)` for each unit that has no record yet; the JSON values that they return, in order.

    Raises:
        UserError: a unit met bad input, the disk is full, or a worker was killed.
    """
    results = [_record(where, unit) for unit in units]
    todo = [unit for unit, result in zip(units, results, strict=True) if result is None]
    total = sum(unit.nbytes for unit in units)
    left = sum(unit.nbytes for unit in todo)
    # What a killed run left of a unit is written over.
    free = shutil.disk_usage(where).free
    if left > free:
        raise Interrupted(f"{where}: {left:,} bytes to write, and {free:,} are free; make room, and run again")
    progress(stage, total - left, total)
    tasks = [(str(where), *unit.task) for unit in todo]
    with pool(min(workers, max(1, len(todo)))) as executor:
        for number, result in each(executor, function, tasks):
            unit = todo[number]
            results[unit.number] = result
            file = where / _RECORDS / f"{unit.number}.json"
            file.with_suffix(".tmp").write_text(json.dumps(result))
            os.replace(file.with_suffix(".tmp"), file)
            left -= unit.nbytes
            progress(stage, total - left, total)
    return results


def _told(where: Path, error: BaseException) -> UserError | None:
    """What to say of an error that is no fault of the program; None: it is one."""
    if isinstance(error, BrokenProcessPool):
        return Interrupted(f"{where}: a worker was killed (out of memory?); run again with fewer workers, it goes on")
    if isinstance(error, OSError) and error.errno in FULL:
        return Interrupted(f"{where}: {error.strerror}; make room and run again, it goes on where it was")
    if isinstance(error, OSError):
        return UserError(f"{error.filename or where}: {error.strerror or error}")
    # torch's writer tells a failed write in its own words.
    if isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("PytorchStreamWriter", "inline_container")
    ):
        free = shutil.disk_usage(where).free
        return Interrupted(f"{where}: cannot be written ({free:,} bytes are free); make room and run again, it goes on")
    return None


def _record(where: Path, unit: Unit) -> Any:
    """What an earlier run recorded of a unit; None: nothing."""
    try:
        return json.loads((where / _RECORDS / f"{unit.number}.json").read_text())
    except (OSError, ValueError):
        return None
