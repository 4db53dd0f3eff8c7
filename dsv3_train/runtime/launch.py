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
    """World size when torchrun or srun started this process (and sets the torch variables), else None."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
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
            # Every rank tends to find the same fault: the first one speaks for all.
            messages = sorted(Path(errors).iterdir(), key=lambda file: int(file.name))
            if messages:
                raise UserError(messages[0].read_text(encoding="utf-8"))
        if code:
            raise SystemExit(code)


def report_to_parent(error: UserError) -> bool:
    """In a process that `launch` started: leave the message to the parent. False anywhere else."""
    if _ERRORS not in os.environ:
        return False
    Path(os.environ[_ERRORS], os.environ["RANK"]).write_text(str(error), encoding="utf-8")
    return True


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
    except UserError as error:
        report_to_parent(error)
        code = 2
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        code = 1
        print("".join(f"[rank {rank}] {line}\n" for line in traceback.format_exc().splitlines()), file=sys.stderr)
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
