"""Long writing that is whole or absent at its end, and goes on where it was when it was cut short."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_train import locks, regular, whole
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
_RECORDS, _LOCK = ".records", ".lock"
_BESIDE = re.compile(r"\.lock|\.records/((plan|\d+\.json)(\.unfinished)?|\d+\.tmp)?")
"""What is in TARGET.unfinished beside what is converted."""


@dataclass(frozen=True)
class Unit:
    """What one task does, and records when it is done."""

    number: int
    nbytes: int
    """To be written."""
    function: Callable[..., Any]
    """Called with the directory and `task`; returns what JSON can hold, and not None."""
    task: tuple
    reads: int = 0
    """Bytes of a task that only reads, for progress."""


def worker_count(asked: int | None, nbytes: int) -> int:
    """Processes: as asked, else one per core where there is enough to do; at most MOST_WORKERS, for memory's sake."""
    if asked is None:
        asked = 1 if nbytes < _SMALL else len(os.sched_getaffinity(0))
    return min(asked, MOST_WORKERS)


@contextlib.contextmanager
def unfinished(target: Path, plan: Any, ours: Callable[[str], bool]) -> Iterator[Path]:
    """TARGET.unfinished, locked, which becomes TARGET at the end, when all of it is on the disk itself.

    What was begun with another plan is refused. After a fault of the input nothing stays; cut short, or with a full
    disk, what is whole stays for the next time.

    Args:
        ours: whether a relative path in it is one that this conversion makes (a directory's ends with `/`).

    Raises:
        UserError: the target exists or cannot be written, TARGET.unfinished is somebody else's, or another process is
            at it.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; remove it, or choose another target")
    where = target.with_name(target.name + ".unfinished")
    try:
        held = locks.hold(
            where,
            _LOCK,
            lambda relative: ours(relative) or _BESIDE.fullmatch(relative) is not None,
            "move it away, or choose another target",
        )
    except locks.Busy:
        raise UserError(f"{where}: another process is converting; wait for it") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); choose another target") from None
    with held.lock:
        try:
            _same_plan(where, hashlib.sha256(repr(plan).encode()).hexdigest())
            yield where
            whole.sync_below(where)
            shutil.rmtree(where / _RECORDS)
            where.rename(target)
        except OtherPlan:
            raise
        except BaseException as error:
            told = _told(where, error)
            resumable = not isinstance(told, UserError) or isinstance(told, Interrupted)
            if not (resumable and any((where / _RECORDS).glob("*.json"))):
                held.clear()
                held.undo()
            if told is None or told is error:
                raise
            raise told from None
    # Last, and closed: without it TARGET.unfinished would not be ours, and NFS keeps what is open.
    (target / _LOCK).unlink()
    whole.sync(target.parent)


class OtherPlan(UserError):
    """What was begun there is another conversion."""


class Interrupted(UserError):
    """No fault of the input: what is whole stays, and the same command goes on."""


def _same_plan(where: Path, digest: str) -> None:
    records = where / _RECORDS
    file = records / "plan"
    if file.is_file() and regular.read(file) != digest.encode():
        raise OtherPlan(f"{where}: left by a conversion of other files or options; remove it to begin anew")
    records.mkdir(exist_ok=True)
    if not file.is_file():
        whole.put(file, digest)


def run(where: Path, units: Sequence[Unit], workers: int, progress: Progress, stage: str) -> list[Any]:
    """`function(where, *task)` for each unit that has no record yet; the JSON values that they return, in order.

    Raises:
        UserError: a unit met bad input, the disk is full, or a worker was killed.
    """
    results = [_record(where, unit) for unit in units]
    todo = [unit for unit, result in zip(units, results, strict=True) if result is None]
    total, left = (sum(unit.nbytes + unit.reads for unit in some) for some in (units, todo))
    # What a killed run left of a unit is written over.
    to_write, free = sum(unit.nbytes for unit in todo), shutil.disk_usage(where).free
    if to_write > free:
        raise Interrupted(f"{where}: {to_write:,} bytes to write, and {free:,} are free; make room, and run again")
    progress(stage, total - left, total)
    tasks = [(unit.function, str(where), *unit.task) for unit in todo]
    with pool(min(workers, max(1, len(todo)))) as executor:
        for number, result in each(executor, _call, tasks):
            unit = todo[number]
            results[unit.number] = result
            whole.put(where / _RECORDS / f"{unit.number}.json", json.dumps(result))
            left -= unit.nbytes + unit.reads
            progress(stage, total - left, total)
    return results


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _told(where: Path, error: BaseException) -> UserError | None:
    """What to say of an error that is no fault of the program; None: it is one."""
    if isinstance(error, UserError):
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        return Interrupted(f"{error}; make room and run again, it goes on where it was") if full else error
    if isinstance(error, BrokenProcessPool):
        return Interrupted(f"{where}: a worker was killed (out of memory?); run again with fewer workers, it goes on")
    if isinstance(error, OSError) and error.errno in FULL:
        return Interrupted(
            f"{error.filename or where}: {error.strerror}; make room and run again, it goes on where it was"
        )
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
        return json.loads(regular.read(where / _RECORDS / f"{unit.number}.json"))
    except (OSError, ValueError, RecursionError):
        return None
