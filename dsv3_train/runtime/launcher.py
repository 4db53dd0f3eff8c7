"""What a launcher says of this process in its environment: the one place that reads these variables, and checks them.

torchrun (or a hand) sets RANK and WORLD_SIZE; srun SLURM_PROCID and its like (man srun, "output environment
variables"); mpirun OMPI_COMM_WORLD_* (Open MPI), MV2_COMM_WORLD_* (MVAPICH) or PMI_* (Hydra: MPICH, Intel MPI).
A process that is one of several must never take itself for the only one: what is set in part is refused.
"""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Union

import psutil

from dsv3_train.errors import UserError

MEETING = "DSV3_MEETING"
"""Environment variable: a random word, the same for all ranks of a run, under which they meet."""
_NO_STEP = 0xFFFFFFFA
"""SLURM's numbers from here on are no steps of srun: an interactive shell, a batch script (slurm.h)."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Rank, processes, rank and processes on this machine."""
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"),
    *(name for family in _MPI for name in family),
    "PMIX_RANK",
)
"""All that `read` looks at."""


@dataclass(frozen=True)
class Joined:
    """This process's place among those that a launcher started."""

    launcher: str
    """`torchrun` (or whoever else sets its variables), `srun` or `mpirun`."""
    rank: int
    world_size: int
    local_rank: Union[int, None]
    """Among the processes on this machine; None: not told."""
    address: str
    """Where rank 0 keeps the meeting place: a host's name, or an IPv4 or IPv6 address without brackets."""
    port: Union[int, None]
    """None: not told, and `join` finds one (all processes are on this machine)."""
    one_machine: bool
    """All processes are known to be on this machine."""


def join() -> Joined | None:
    """As `read`, of this process's environment, where torch's five variables are then set.

    Raises:
        UserError: as `read`.
    """
    found = read(os.environ)
    if found is None:
        return None
    if found.port is None:
        found = replace(found, port=20000 + _started_by(found) % 12000)
    os.environ.update(RANK=str(found.rank), WORLD_SIZE=str(found.world_size))
    os.environ.update(MASTER_ADDR=found.address, MASTER_PORT=str(found.port))
    if found.local_rank is not None:
        os.environ["LOCAL_RANK"] = str(found.local_rank)
    return found


def read(env: Mapping[str, str], first_host: Callable[[str], str] | None = None) -> Joined | None:
    """The place that a launcher gave this process; None: there is none, and this one starts the others itself.

    Also None for the only process of a launcher, as in the shell of `salloc` or under `srun --ntasks=1`.

    Args:
        first_host: the first name of a SLURM list such as `n[7-8]`; None: asks scontrol.

    Raises:
        UserError: a variable is missing beside others, is no number, or contradicts another: named.
    """
    if "TORCHELASTIC_RUN_ID" in env and "RANK" in env and "WORLD_SIZE" in env:
        return _of_torch(env, None)  # whatever started torchrun
    step = _of_srun(env, first_host or _first_host)
    started = _of_mpi(env, step) or step
    return _of_torch(env, started) or started


def _of_torch(env: Mapping[str, str], started: Joined | None) -> Joined | None:
    """What RANK and WORLD_SIZE say; None where they say nothing more than `started`."""
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env]
    if "RANK" not in names or "WORLD_SIZE" not in names:
        if started is not None:
            for name, value in zip(
                ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
                (started.rank, started.world_size, started.local_rank),
                strict=True,
            ):
                if name in names and _number(env, name) != value:
                    raise UserError(
                        f"{name}: {env[name]} contradicts {started.launcher}, which says {value}; unset {name}"
                    )
            return None
        if names:
            missing = "RANK" if "RANK" not in names else "WORLD_SIZE"
            raise UserError(
                f"{missing}: not set, but {names[0]}={env[names[0]]} is; set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR "
                f"and MASTER_PORT as torchrun does, or unset {' '.join(names)} to start the processes from here"
            )
        return None
    rank, world = _rank(env, "RANK", "WORLD_SIZE")
    if started is not None and world < started.world_size:
        raise UserError(
            f"WORLD_SIZE: {world}, but {started.launcher} started {started.world_size} processes: of another run? "
            "unset RANK WORLD_SIZE LOCAL_RANK"
        )
    local = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else (0 if world == 1 else None)
    here = _number(env, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in env else world
    if local is not None and local >= here:
        raise UserError(f"LOCAL_RANK: {local}, but there are {here} processes; set it to 0 to {here - 1}")
    alone = world == 1 or ("LOCAL_WORLD_SIZE" in env and here == world)
    same = started is not None and (started.rank, started.world_size) == (rank, world)  # `join` has set them
    name = started.launcher if started is not None and same else "torchrun"
    return Joined(name, rank, world, local, *_place(env, alone and world == 1, name, alone))


def _of_srun(env: Mapping[str, str], first_host: Callable[[str], str]) -> Joined | None:
    """In a batch script there is no step, and the shell of an interactive `salloc` is a step of one task, which has the
    job's number of tasks for its SLURM_NTASKS.
    """
    if "SLURM_STEP_ID" not in env:
        for name, least in (("SLURM_PROCID", 1), ("SLURM_STEP_NUM_TASKS", 2)):
            if name in env and _number(env, name) >= least:
                raise UserError(
                    f"SLURM_STEP_ID: not set, but {name}={env[name]} tells of several tasks; pass on all that srun "
                    f"sets (SLURM_*), or unset {name}"
                )
        return None
    step = _number(env, "SLURM_STEP_ID")
    if step >= _NO_STEP:
        return None
    counts = [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env]
    for name, there in (("SLURM_PROCID", "SLURM_PROCID" in env), ("SLURM_STEP_NUM_TASKS", counts)):
        if not there:
            raise UserError(
                f"{name}: not set, but SLURM_STEP_ID={step} tells of a step of srun; pass on all that srun sets "
                "(SLURM_*), or unset SLURM_STEP_ID"
            )
    rank, tasks = _rank(env, "SLURM_PROCID", counts[0])
    if tasks == 1:
        return None
    local = _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else None
    alone = "SLURM_STEP_NUM_NODES" in env and _number(env, "SLURM_STEP_NUM_NODES", 1) == 1
    env = dict(env)
    if "MASTER_ADDR" not in env and not alone:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UserError("MASTER_ADDR: not set, nor SLURM_JOB_NODELIST; set it to the address of the first node")
        env["MASTER_ADDR"] = first_host(nodes) if "[" in nodes else nodes.split(",")[0]
    if "MASTER_PORT" not in env:
        # Below the ports that Linux gives to who asks for any (from 32768 on); steps beside each other meet apart.
        if "SLURM_JOB_ID" not in env:
            raise UserError("SLURM_JOB_ID: not set, and the port to meet at comes from it; set MASTER_PORT")
        env["MASTER_PORT"] = str(20000 + (_number(env, "SLURM_JOB_ID") + 1009 * step) % 12000)
    return Joined("srun", rank, tasks, local, *_place(env, alone, "srun", alone))


def _of_mpi(env: Mapping[str, str], step: Joined | None) -> Joined | None:
    for rank_name, size_name, local_name, here_name in _MPI:
        there = [name for name in (rank_name, size_name) if name in env]
        if not there:
            continue
        if len(there) == 1:
            if "SLURM_STEP_ID" in env:
                continue  # of srun --mpi, which says the rest in its own variables
            missing = size_name if there == [rank_name] else rank_name
            raise UserError(
                f"{missing}: not set, but {there[0]}={env[there[0]]} is; pass on all that mpirun sets, or unset "
                f"{there[0]}"
            )
        rank, size = _rank(env, rank_name, size_name)
        if size == 1:
            return None
        if step is not None and (step.rank, step.world_size) == (rank, size):
            return (
                step  # srun --mpi=pmi2 sets both; where they differ, srun started mpirun's daemons, and those the ranks
            )
        local = _number(env, local_name) if local_name in env else None
        alone = here_name in env and _number(env, here_name, 1) == size
        return Joined("mpirun", rank, size, local, *_place(env, alone, "mpirun", alone))
    if "PMIX_RANK" in env and "SLURM_STEP_ID" not in env and not ("RANK" in env and "WORLD_SIZE" in env):
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE: not set, but PMIX_RANK={env['PMIX_RANK']} is: how many processes there are is not "
            "told; set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset PMIX_RANK"
        )
    return None


def _place(env: Mapping[str, str], findable: bool, launcher: str, alone: bool) -> tuple[str, int | None, bool]:
    """Address and port of the meeting place, and whether all processes are on this machine.

    Args:
        findable: no other process has to be told, or all of them find the same.
        alone: the launcher says that all processes are on this machine.
    """
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    alone = alone or env.get("MASTER_ADDR", "").strip("[]") in _LOOPBACK
    for name, what in (("MASTER_ADDR", "the address of rank 0's machine"), ("MASTER_PORT", "a free port there")):
        if name not in env and not findable:
            raise UserError(f"{name}: not set, and {launcher} started several processes; set it to {what}")
    address = "127.0.0.1" if alone and not agent else _address(env["MASTER_ADDR"])
    if "MASTER_PORT" not in env:
        return address, None, alone
    port = _number(env, "MASTER_PORT")
    if port == 0:
        # torchrun hands its --master-port=0 on as it is: every rank would knock at port 0 until a time-out.
        raise UserError("MASTER_PORT: 0 is no port to meet at; start with torchrun --standalone, or --master-port=N")
    if port > 65535:
        raise UserError(f"MASTER_PORT: {port} is no port; set 1 to 65535")
    return address, port, alone


def _address(text: str) -> str:
    """A host's name, or an address, without the brackets that IPv6 has in URLs."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        if bare != text or not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?", text):
            raise UserError(
                f"MASTER_ADDR: {text!r} is neither a host's name nor an address; a port goes into MASTER_PORT"
            ) from None
    return bare


def _rank(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(env, rank_name), _number(env, size_name, 1)
    if rank >= size:
        raise UserError(f"{rank_name}: {rank}, but {size_name}={size}; ranks are 0 to {size - 1}")
    return rank, size


def _number(env: Mapping[str, str], name: str, least: int = 0) -> int:
    text = env[name].strip()
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise UserError(f"{name}: {env[name]!r} is no whole number of {least} or more; set one, or unset it")
    return int(text)


def _first_host(nodes: str) -> str:
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return told.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"MASTER_ADDR: not set, and scontrol does not say here which node is the first of {nodes}; set it to that "
            "node's address before srun"
        ) from None


def _started_by(found: Joined) -> int:
    """The process that started all ranks on this machine: the nearest above that is none of them, nor their shell."""
    process = psutil.Process()
    if found.launcher != "mpirun":
        return process.pid
    ranks = [family[0] for family in _MPI]
    for above in process.parents():
        try:
            if not any(name in above.environ() for name in ranks):
                return above.pid
        except psutil.Error:  # it is somebody else's, or gone
            return above.pid
    return 0
