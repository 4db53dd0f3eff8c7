"""TERM, USR1, INT, HUP: a wish to stop, noted at once, granted at the end of a step; a second INT ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time

from dsv3_train.runtime.exits import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_SAME = 1.0
"""Seconds within which a second signal is the same wish: a group and its launcher both pass it on."""


def heard() -> list[signal.Signals]:
    """Those of `SIGNALS` that reach this process: nohup has it ignore HUP, and `&` in a script, INT."""
    silenced = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN]
    return [number for number in SIGNALS if number not in silenced]


def end_when_asked() -> None:
    """Let a scheduler's wish to stop end this process, `PREEMPTED`: nothing is under way that could be saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(PREEMPTED))


class StopRequest:
    """Whether this process was asked to stop. Make it in the main thread.

    Until `heed` is called nothing would ever look, and nothing is to be saved: a signal ends the process, `PREEMPTED`.

    Signals are read by a thread of their own, since Python calls no handler while the main thread waits inside a
    collective. Processes that are forked later (data workers, checkpoint writers) ignore all of them: SLURM and
    terminals send them to every process of a job, and the rank alone decides when those may go.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the first signal; None before it."""
        self._since = 0.0
        self._heeded = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in heard():
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_ignore)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def heed(self) -> None:
        """From here on somebody looks at every step."""
        self._heeded = True

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number not in SIGNALS:
                    continue
                if not self._heeded:
                    os._exit(PREEMPTED)
                if self.name is None:
                    self.name, self._since = signal.Signals(number).name, time.monotonic()
                elif number == signal.SIGINT and time.monotonic() - self._since > _SAME:
                    # Somebody is impatient. A scheduler that asks again (TERM at a lead time, and at the limit) is not:
                    # what it does next is SIGKILL, and until then a save may end.
                    os._exit(128 + number)


def _noted(number: int, frame: object) -> None:
    """The thread has it; without any handler there would be the default, to die."""


def _ignore() -> None:
    signal.set_wakeup_fd(-1)
    ignore_in_worker()


def ignore_in_worker(worker: int = 0) -> None:
    """Leave signals to the rank (also torch's data workers, which set handlers of their own after the fork)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
