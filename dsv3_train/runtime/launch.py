"""Starting the processes of a run: join torchrun or SLURM, or start them on this machine, and again after a fault.

Not torch elastic: it starts every rank as a new interpreter (7 s of imports each on a CPU, at every restart), and does
not know which failures got a run no further; forking from one process that has imported all takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from dsv3_train.errors import UserError, of_file, printable
from dsv3_train.runtime import heartbeat, incidents
from dsv3_train.runtime.exits import FINAL, PREEMPTED, leave
from dsv3_train.runtime.launcher import MEETING, join
from dsv3_train.runtime.signals import heard

_LIBC = ctypes.CDLL(None)
_GRACE_SECONDS = 5.0
"""For the other ranks to say why they fail too, once one is gone."""
_REPORTS = "DSV3_REPORTS"
"""Environment variable of a rank: descriptor of the file in which ranks leave their reports."""
ATTEMPT = "DSV3_ATTEMPT"
"""Environment variable of a rank: how often the run was started again before."""


@dataclass(frozen=True)
class Restarts:
    """When a run on this machine is started again after a fault."""

    limit: int
    """Failures in a row, without progress between them, after which it is not."""
    run_dir: Path
    """Where the ranks' heartbeats are, and where incidents are recorded."""
    progress: Callable[[], Any]
    """Something that changes as the run gets on: its newest checkpoint."""


def launch(work: Callable[[], None], world_size: int, device: str, restarts: Restarts | None = None) -> None:
    """Run `work` in `world_size` processes and wait for all of them.

    In each, RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. On a CPU the
    processes are forked, so that torch and Megatron are imported once; for GPUs the command line is started again,
    once per GPU. Signals that ask for a stop (runtime/signals.py) are passed on to them.

    Args:
        restarts: start all of them again when one dies or hangs; None: never. (Under torchrun or srun, those decide.)

    Raises:
        UserError: the launcher that started us has another number of processes, or set its variables in part; or `work`
            raised it in a process.
        SystemExit: a process failed otherwise; its traceback, or how it died, is on stderr.
    """
    joined = join()
    if joined is not None:
        if joined.world_size != world_size:
            raise UserError(
                f"parallel.world_size: the recipe says {world_size}, but {joined.world_size} processes were started "
                f"({joined.launcher}); start {world_size}, or set parallel.world_size={joined.world_size}"
            )
        if device == "cuda" and joined.local_rank is None:
            raise UserError("LOCAL_RANK: not set, and it says which GPU of its node is this process's; set it")
        work()
    elif world_size == 1 and restarts is None:
        os.environ.update(_rank_environment(0, 1, _free_port(), secrets.token_hex(16)))
        work()
    else:
        _keep_running(work, world_size, device, restarts)


def report_to_parent(error: BaseException) -> bool:
    """In a process that `launch` started: leave what went wrong to the parent. False anywhere else."""
    fault = isinstance(error, UserError)
    text = str(error) if fault else "".join(traceback.format_exception(error))
    return leave_report("fault" if fault else "crash", text)


def leave_report(kind: str, text: str) -> bool:
    """Leave a `fault`, `hang` or `crash` for the process that started this one. False if `launch` did not."""
    if _REPORTS not in os.environ:
        return False
    line = json.dumps([int(os.environ["RANK"]), kind, text]) + "\n"
    with contextlib.suppress(OSError):  # a full disk: the exit code tells as much
        os.write(int(os.environ[_REPORTS]), line.encode())  # whole, at the place that all ranks share
    return True


def _keep_running(work: Callable[[], None], world_size: int, device: str, restarts: Restarts | None) -> None:
    attempt = failures = 0
    before = restarts.progress() if restarts else None
    # A file without a name: nothing of it is left, however this process ends.
    with _Children() as children, tempfile.TemporaryFile(buffering=0) as file:
        os.set_inheritable(file.fileno(), True)
        while True:
            os.environ.update({_REPORTS: str(file.fileno()), ATTEMPT: str(attempt)})
            try:
                code, first = children.run(_fork if device == "cpu" else _respawn, work, world_size)
            finally:
                del os.environ[_REPORTS], os.environ[ATTEMPT]
            reports = _reports(file)
            faults = [text for _, kind, text in reports if kind == "fault"]
            if faults:
                raise UserError(faults[0])
            if code == 0:
                return
            if code == PREEMPTED:
                raise SystemExit(code)
            _say_what_happened(reports, first, restarts)
            if restarts is None or code in FINAL or children.stopping:
                raise SystemExit(code)
            now = restarts.progress()
            failures = 1 if now != before else failures + 1
            before, attempt = now, attempt + 1
            if failures > restarts.limit:
                print(f"{failures} failures in a row without a new checkpoint: not started again", file=sys.stderr)
                raise SystemExit(code)
            print(f"starting again ({failures} of {restarts.limit} without a new checkpoint)", file=sys.stderr)
            file.seek(0)
            file.truncate()


@dataclass(frozen=True)
class _End:
    """How a rank's process ended."""

    rank: int
    code: int
    """Exit code; -N: killed by signal N."""


_Report = tuple[int, str, str]
"""Rank, `fault`, `hang` or `crash`, and the text."""


def _reports(file: IO[bytes]) -> list[_Report]:
    """What the ranks left, the first one first."""
    file.seek(0)
    found = []
    for line in file.read().splitlines():
        with contextlib.suppress(ValueError):  # a full disk cut it short
            found.append(tuple(json.loads(line)))
    return found


def _say_what_happened(reports: list[_Report], first: _End, restarts: Restarts | None) -> None:
    """Say once what many ranks met. The other ranks' errors follow from the first: a peer that is gone."""
    crashes = [(rank, text) for rank, kind, text in reports if kind == "crash"]
    hangs = [text for _, kind, text in reports if kind == "hang"]
    last = heartbeat.read(restarts.run_dir / "heartbeats" / str(first.rank)) if restarts else None
    at = f"; last seen: {last}" if last else ""
    if hangs:
        print(printable(hangs[0]), file=sys.stderr)
    elif first.code < 0:
        text = printable(f"rank {first.rank} was ended by {signal.Signals(-first.code).name} on {platform.node()}{at}")
        print(text, file=sys.stderr)
        if first.code == -signal.SIGKILL:
            print("(a SIGKILL that nobody sent is the kernel's, out of memory: see dmesg)", file=sys.stderr)
        if restarts:
            incidents.record(restarts.run_dir, "death", text=text, rank=first.rank, step=last.step if last else None)
    elif crashes:
        rank, trace = crashes[0]
        print("\n".join(f"[rank {rank}] {line}" for line in trace.splitlines()), file=sys.stderr)
        if crashes[1:]:
            print(f"ranks {', '.join(str(rank) for rank, _ in crashes[1:])} failed after it", file=sys.stderr)
        if restarts:
            text = f"rank {rank} on {platform.node()}: {trace.strip().splitlines()[-1]}{at}"
            incidents.record(restarts.run_dir, "crash", text=text, rank=rank, step=last.step if last else None)
    else:
        print(f"rank {first.rank} ended with exit code {first.code}{at}", file=sys.stderr)
    sys.stderr.flush()


def _free_port() -> int:
    """One that the kernel gives to nobody who just asks for any: rank 0 takes it only when it has imported torch."""
    for port in random.SystemRandom().sample(range(10000, 20000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("MASTER_PORT: ports 10000 to 19999 are all in use; start with torchrun --master-port=N")


def _rank_environment(rank: int, world_size: int, port: int, meeting: str = "") -> dict[str, str]:
    return {
        MEETING: meeting,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _fork(work: Callable[[], None], world_size: int) -> list[int]:
    return _start(lambda: _run_child(work), world_size)


def _respawn(work: Callable[[], None], world_size: int) -> list[int]:
    command = [sys.executable, "-m", "dsv3_cli.main", *sys.argv[1:]]
    return _start(lambda: os.execv(command[0], command), world_size)


def _start(begin: Callable[[], NoReturn], world_size: int) -> list[int]:
    """A process for each rank, which ends with this one; in it, `begin()` is the rank."""
    port, meeting = _free_port(), secrets.token_hex(16)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(parent)
                os.environ.update(_rank_environment(rank, world_size, port, meeting))
                begin()
            except BaseException:  # a signal's handler may raise anywhere (torch's, when a data worker dies)
                traceback.print_exc()
            finally:
                os._exit(1)  # never back into the launcher's code, which would clean up after itself
        children.append(pid)
    return children


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process, or what it becomes by exec, when `parent` is gone (Linux): it would only hold
    memory, ports and files.
    """
    if sys.platform == "linux":
        _LIBC.prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _run_child(work: Callable[[], None]) -> NoReturn:
    """What a forked rank does, to its end."""
    for number in heard():
        signal.signal(number, signal.SIG_DFL)  # the parent's handler would end its other children
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        error = of_file(error) or error
        code = 2 if isinstance(error, UserError) else 1
        report_to_parent(error)
    leave(code)


class _Children:
    """The ranks' processes: signals passed on to them, none left when they end."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        """Rank of each process."""
        self.stopping = False
        """Whether we were asked to stop: then nothing is started again."""

    def __enter__(self) -> _Children:
        # Not ours: what this process started before.
        self._others = {child.pid for child in psutil.Process().children(recursive=True)}
        self._before = {number: signal.signal(number, self._pass_on) for number in heard()}
        if sys.platform == "linux":
            _LIBC.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a dead rank's helpers become our children
        return self

    def __exit__(self, *error: object) -> None:
        self._end_all()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if sys.platform == "linux":
            _LIBC.prctl(36, 0)

    def _pass_on(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and not self.stopping:
            print("stopping at the end of the step; Ctrl-C again: at once", file=sys.stderr, flush=True)
        self.stopping = True
        for pid in list(self.alive):
            with contextlib.suppress(ProcessLookupError):  # ended and buried, and about to be struck off `alive`
                os.kill(pid, number)

    def run(
        self, start: Callable[[Callable[[], None], int], list[int]], work: Callable[[], None], world_size: int
    ) -> tuple[int, _End]:
        """Start the ranks and wait for them; when one fails, give the others a moment to say why, then end them.

        Returns the exit code of the whole (128 + N for signal N) and the end of the rank that failed first.
        """
        self.alive = {pid: rank for rank, pid in enumerate(start(work, world_size))}
        if self.stopping:  # asked while they were being started
            self._pass_on(signal.SIGTERM, None)
        first, deadline = _End(0, 0), float("inf")
        while self.alive:
            for pid in list(self.alive):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    end = _End(self.alive.pop(pid), os.waitstatus_to_exitcode(status))
                    if end.code and not first.code:
                        first = end
                        deadline = time.monotonic() + (_GRACE_SECONDS if end.code != PREEMPTED else 60)
            if time.monotonic() > deadline:
                for pid in self.alive:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._end_all()
        return first.code if first.code >= 0 else 128 - first.code, first

    def _end_all(self) -> None:
        """Kill and bury the ranks, their writers and data workers."""
        doomed = [child for child in psutil.Process().children(recursive=True) if child.pid not in self._others]
        for child in doomed:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(doomed, timeout=5)
        self.alive = {}
