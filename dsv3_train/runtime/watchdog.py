"""A thread that ends a rank which makes no progress, and names who keeps everyone waiting."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from dsv3_train.runtime import incidents
from dsv3_train.runtime.exits import HUNG
from dsv3_train.runtime.heartbeat import Beat, Heartbeat, read
from dsv3_train.runtime.launch import leave_report

_COMMUNICATION = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "dsv3_train/pipeline/messages.py",
)
"""Where a main thread is that waits for other ranks."""


class Watchdog:
    """Looks after the main thread of the process that makes it.

    No mark for `limit` seconds: the rank leaves its stacks in RUN_DIR/hangs, the first to do so compares everyone's
    heartbeats and says who is at fault, and it ends with exit code `HUNG`. All of that takes a tenth of `limit`. Should
    this thread not run either (a library that holds Python's lock), `faulthandler` ends the process at twice `limit`.
    """

    def __init__(self, heartbeat: Heartbeat, run_dir: Path, world_size: int, limit: float) -> None:
        self._heartbeat, self._run_dir, self._world_size, self._limit = heartbeat, run_dir, world_size, limit
        self._tick = min(max(limit / 10, 0.1), 15.0)
        self._main = threading.get_ident()
        self._claim = run_dir / "hangs" / "told"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._heartbeat.rank == 0:
            with contextlib.suppress(OSError):  # of a hang before this start
                self._claim.unlink()
        self._heartbeat.mark(self._heartbeat.operation)
        self._thread.start()

    def stop(self) -> None:
        """No longer watch."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(self._tick):
            faulthandler.dump_traceback_later(2 * self._limit, exit=True)
            self._heartbeat.beat(*_place(sys._current_frames().get(self._main)))
            if time.monotonic() - self._heartbeat.began > self._limit:
                self._end()

    def _end(self) -> None:
        """The first rank that gets here tells of all; launchers end the others soon after the first that has ended."""
        self._dump_stacks()
        if self._is_first():
            now = time.time()
            beats = {rank: read(self._run_dir / "heartbeats" / str(rank)) for rank in range(self._world_size)}
            text = f"no progress for {self._limit:g} s: {blame(beats, now, max(3 * self._tick, 2.0))}"
            incidents.record(self._run_dir, "hang", text=text, step=self._heartbeat.step)
            if not leave_report("hang", text):
                print(f"[rank {self._heartbeat.rank}] {text}", file=sys.stderr, flush=True)
            time.sleep(min(self._limit / 20, 10.0))  # marks are seconds apart: the others leave their stacks
        else:
            time.sleep(min(self._limit / 10, 30.0))
        os._exit(HUNG)

    def _is_first(self) -> bool:
        """Of all ranks; where nothing can be written every one is, rather than none."""
        try:
            os.close(os.open(self._claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass
        return True

    def _dump_stacks(self) -> None:
        """Where every thread is, and on a GPU what NCCL's flight recorder knows."""
        place = self._run_dir / "hangs"
        try:
            place.mkdir(exist_ok=True)
            with (place / f"{self._heartbeat.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
                recorded = sys.modules["torch"]._C._distributed_c10d._dump_nccl_trace()
                (place / f"nccl-{self._heartbeat.rank}.pickle").write_bytes(recorded)
        except OSError:
            faulthandler.dump_traceback()


def blame(beats: dict[int, Beat | None], now: float, silence: float) -> str:
    """Who keeps the others waiting, in words.

    A process that does not run at all; else the ranks that are not waiting in communication while others are; else
    those that are furthest behind.

    Args:
        silence: seconds without a sign of life after which a process counts as stopped or gone.
    """
    running = [beat for beat in beats.values() if beat is not None and now - beat.alive <= silence]
    absent = [rank for rank, beat in beats.items() if beat is None]
    silent = [beat for beat in beats.values() if beat is not None and now - beat.alive > silence]
    if absent:
        return f"rank {', '.join(map(str, absent))} never began to train"
    if silent:
        return "; ".join(
            f"{beat} gave no sign of life for {now - beat.alive:.0f} s: stopped, or its machine is gone"
            for beat in silent
        )
    busy = [beat for beat in running if not beat.waiting]
    if not busy or len(busy) == len(running):
        first = min((beat.step, beat.marks) for beat in running)
        busy = [beat for beat in running if (beat.step, beat.marks) == first]
    return "; ".join(f"{beat}, at {beat.where} for {now - beat.since:.0f} s" for beat in busy)


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack ends in communication, and its innermost place outside of torch."""
    waiting = frame is not None and any(name in frame.f_code.co_filename for name in _COMMUNICATION)
    while frame is not None and "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    if frame is None:
        return waiting, "an unknown place"
    file = Path(frame.f_code.co_filename)
    return waiting, f"{frame.f_code.co_name} ({file.parent.name}/{file.name}:{frame.f_lineno})"
