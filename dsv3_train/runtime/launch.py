"""Starting the processes of a run: join torchrun or SLURM, or start them on this machine."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dsv3_train.errors import UserError

_GRACE_SECONDS = 5.0
_ERRORS = "DSV3_ERROR_DIR"


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
    # `srun` gives every task a rank; inside `salloc` or a batch script alone there is no step.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
        )
        env.setdefault("MASTER_ADDR", hosts.stdout.split()[0])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=env["SLURM_NTASKS"])
        return int(env["WORLD_SIZE"])
    return None


def launch(work: Callable[[], None], world_size: int, device: str) -> None:
    """Run `work` in `world_size` processes and wait for all of them.

    In each, RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. On a CPU the
    processes are forked, so that torch and Megatron are imported once; for GPUs the command line is started again,
    once per GPU.

    Raises:
        UserError: the launcher that started us has another number of processes; or `work` raised it in a process.
        SystemExit: a process failed otherwise; its traceback is on stderr.
    """
    joined = joined_world()
    if joined is not None:
        if joined != world_size:
            raise UserError(
                f"parallel.world_size: the recipe says {world_size}, but {joined} processes were started; "
                f"start {world_size}, or set parallel.world_size={joined}"
            )
        work()
    elif world_size == 1:
        os.environ.update(_rank_environment(0, 1, _free_port()))
        work()
    else:
        with tempfile.TemporaryDirectory(prefix="dsv3-") as errors:
            os.environ[_ERRORS] = errors
            start = _fork if device == "cpu" else _respawn
            code = _wait(start(work, world_size))
            del os.environ[_ERRORS]
            _raise_first(Path(errors))
        if code:
            raise SystemExit(code)


def report_to_parent(error: BaseException) -> bool:
    """In a process that `launch` started: leave what went wrong to the parent. False anywhere else."""
    if _ERRORS not in os.environ:
        return False
    fault = isinstance(error, UserError)
    text = str(error) if fault else "".join(traceback.format_exception(error))
    name = f"{os.environ['RANK']}.{'fault' if fault else 'crash'}"
    Path(os.environ[_ERRORS], name).write_text(text, encoding="utf-8")
    return True


def _raise_first(errors: Path) -> None:
    """Say once what many ranks met: a fault of the input, else the crash that came first.

    The other ranks' errors follow from it: a peer that is gone.
    """
    faults = sorted(errors.glob("*.fault"), key=lambda file: int(file.stem))
    if faults:
        raise UserError(faults[0].read_text(encoding="utf-8"))
    crashes = sorted(errors.glob("*.crash"), key=lambda file: file.stat().st_mtime_ns)
    if crashes:
        text = crashes[0].read_text(encoding="utf-8")
        print("\n".join(f"[rank {crashes[0].stem}] {line}" for line in text.splitlines()), file=sys.stderr)
        if crashes[1:]:
            print(f"ranks {', '.join(file.stem for file in crashes[1:])} failed after it", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _fork(work: Callable[[], None], world_size: int) -> list[int]:
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(_rank_environment(rank, world_size, port))
            os._exit(_run_child(work, rank))
        children.append(pid)
    return children


def _run_child(work: Callable[[], None], rank: int) -> int:
    """Exit code of one forked rank."""
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 2 if isinstance(error, UserError) else 1
        report_to_parent(error)
    # os._exit skips this, and a checkpoint's helper process would be left behind.
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _respawn(work: Callable[[], None], world_size: int) -> list[int]:
    port = _free_port()
    command = [sys.executable, "-m", "dsv3_cli.main", *sys.argv[1:]]
    return [
        subprocess.Popen(command, env={**os.environ, **_rank_environment(rank, world_size, port)}).pid
        for rank in range(world_size)
    ]


def _wait(children: list[int]) -> int:
    """Wait for every child; when one fails, give the others a moment to say why, then end them."""
    alive, code, deadline = set(children), 0, None

    def forward(signum, frame) -> None:
        for pid in alive:
            os.kill(pid, signum)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        while alive:
            for pid in list(alive):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    alive.discard(pid)
                    exit_code = os.waitstatus_to_exitcode(status)
                    if exit_code and not code:
                        code = exit_code if exit_code > 0 else 128 - exit_code
                        deadline = time.monotonic() + _GRACE_SECONDS
            if deadline and time.monotonic() > deadline:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    except KeyboardInterrupt:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code
