"""Starting the processes of a run: join torchrun or SLURM, or start them on this machine, and again after a fault.

Not torch elastic: it starts every rank as a new interpreter (7 s of imports each on a CPU, at every restart), and does
not know which failures got a run no further; forking from one process that has imported all takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from dsv3_train.errors import UserError, of_file
from dsv3_train.runtime import heartbeat, incidents
from dsv3_train.runtime.exits import FINAL, PREEMPTED, leave
from dsv3_train.runtime.signals import heard

_LIBC = ctypes.CDLL(None)
_GRACE_SECONDS = 5.0
"""For the other ranks to say why they fail too, once one is gone."""
_ERRORS = "DSV3_ERROR_DIR"
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


def joined_world() -> int | None:
    """World size when torchrun or srun started this process (and sets the torch variables), else None.

    Raises:
        UserError: there is a rank, but no port on which the ranks could meet.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        if env.get("MASTER_PORT") == "0":
            # torchrun hands its --master-port=0 on as it is: every rank would knock at port 0 until a time-out.
            raise UserError(
                "MASTER_PORT: 0 is no port to meet at; start with torchrun --standalone, or --master-port=N"
            )
        return int(env["WORLD_SIZE"])
    tasks = slurm_tasks(env)
    if tasks is not None:
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"]))
        # Below the ports that Linux gives to who asks for any (from 32768 on); steps beside each other meet apart.
        number = int(env["SLURM_JOB_ID"]) + 1009 * int(env["SLURM_STEP_ID"])
        env.setdefault("MASTER_PORT", str(20000 + number % 12000))
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=str(tasks))
    return tasks


def slurm_tasks(env: Mapping[str, str]) -> int | None:
    """Processes that `srun` started beside this one, if it gave it a rank; else None.

    In a batch script there is no step, and the shell of an interactive `salloc` is a step of one task, which has the
    job's number of tasks for its SLURM_NTASKS.
    """
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    return tasks if tasks > 1 else None


def _first_host(nodes: str) -> str:
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return told.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"MASTER_ADDR: not set, and scontrol does not say here which node is the first of {nodes}; set it to that "
            "node's address before srun"
        ) from None


def launch(work: Callable[[], None], world_size: int, device: str, restarts: Restarts | None = None) -> None:
    """Run `work` in `world_size` processes and wait for all of them.

    In each, RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. On a CPU the
    processes are forked, so that torch and Megatron are imported once; for GPUs the command line is started again,
    once per GPU. Signals that ask for a stop (runtime/signals.py) are passed on to them.

    Args:
        restarts: start all of them again when one dies or hangs; None: never. (Under torchrun or srun, those decide.)

    Raises:
        UserError: the launcher that started us has another number of processes; or `work` raised it in a process.
        SystemExit: a process failed otherwise; its traceback, or how it died, is on stderr.
    """
    joined = joined_world()
    if joined is not None:
        if joined != world_size:
            raise UserError(
                f"parallel.world_size: the recipe says {world_size}, but {joined} processes were started; "
                f"start {world_size}, or set parallel.world_size={joined}"
            )
        work()
    elif world_size == 1 and restarts is None:
        os.environ.update(_rank_environment(0, 1, _free_port()))
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
    if _ERRORS not in os.environ:
        return False
    path = Path(os.environ[_ERRORS], f"{os.environ['RANK']}.{kind}")
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)
    return True


def _keep_running(work: Callable[[], None], world_size: int, device: str, restarts: Restarts | None) -> None:
    attempt = failures = 0
    before = restarts.progress() if restarts else None
    with _Children() as children, tempfile.TemporaryDirectory(prefix="dsv3-") as errors:
        while True:
            os.environ.update({_ERRORS: errors, ATTEMPT: str(attempt)})
            try:
                code, first = children.run(_fork if device == "cpu" else _respawn, work, world_size)
            finally:
                del os.environ[_ERRORS], os.environ[ATTEMPT]
            faults = _reports(Path(errors), "fault")
            if faults:
                raise UserError(faults[0][1])
            if code == 0:
                return
            if code == PREEMPTED:
                raise SystemExit(code)
            _say_what_happened(Path(errors), first, restarts)
            if restarts is None or code in FINAL or children.stopping:
                raise SystemExit(code)
            now = restarts.progress()
            failures = 1 if now != before else failures + 1
            before, attempt = now, attempt + 1
            if failures > restarts.limit:
                print(f"{failures} failures in a row without a new checkpoint: not started again", file=sys.stderr)
                raise SystemExit(code)
            print(f"starting again ({failures} of {restarts.limit} without a new checkpoint)", file=sys.stderr)
            for left in Path(errors).iterdir():
                left.unlink()


@dataclass(frozen=True)
class _End:
    """How a rank's process ended."""

    rank: int
    code: int
    """Exit code; -N: killed by signal N."""


def _reports(errors: Path, kind: str) -> list[tuple[int, str]]:
    """(rank, text) of the reports of a kind, the first one first."""
    found = sorted(errors.glob(f"*.{kind}"), key=lambda file: file.stat().st_mtime_ns)
    return [(int(file.stem), file.read_text(encoding="utf-8")) for file in found]


def _say_what_happened(errors: Path, first: _End, restarts: Restarts | None) -> None:
    """Say once what many ranks met. The other ranks' errors follow from the first: a peer that is gone."""
    crashes, hangs = _reports(errors, "crash"), _reports(errors, "hang")
    last = heartbeat.read(restarts.run_dir / "heartbeats" / str(first.rank)) if restarts else None
    at = f"; last seen: {last}" if last else ""
    if hangs:
        print(hangs[0][1], file=sys.stderr)
    elif first.code < 0:
        text = f"rank {first.rank} was ended by {signal.Signals(-first.code).name} on {platform.node()}{at}"
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


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
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
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(parent)
                os.environ.update(_rank_environment(rank, world_size, port))
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
