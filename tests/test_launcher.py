"""The variables of launchers: the place that each gives a process, or the refusal that names the variable."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsv3_train.errors import UserError
from dsv3_train.runtime import launcher
from dsv3_train.runtime.launcher import Joined, join, read

TORCHRUN = {
    **{"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    **{"MASTER_ADDR": "n0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
}
"""torch 2.13, the second of two nodes."""
ALONE = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
BATCH = {
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "n0,n1",
}
"""A batch script."""
SRUN = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
"""The last of four tasks on two nodes."""
SALLOC = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
"""Its shell in SLURM 22.05, with use_interactive_step."""
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    **{"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "1286602753"},
}
"""Open MPI 4.1, two on one machine."""
APART = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
DAEMON = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
"""Of mpirun's daemon on the second node, which srun started."""
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "8"}
"""MPICH 4.0's mpiexec.hydra, two on one machine; Intel MPI sets the same."""
PLACE = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
HAND = {"RANK": "1", "WORLD_SIZE": "2", **PLACE}


def less(environment: dict, *names: str) -> dict:
    return {name: value for name, value in environment.items() if name not in names}


def here(launched: str, rank: int, world: int, local: int | None, port: int | None) -> Joined:
    return Joined(launched, rank, world, local, "127.0.0.1", port, True)


def there(launched: str, rank: int, world: int, local: int | None, port: int, address: str = "n0") -> Joined:
    return Joined(launched, rank, world, local, address, port, False)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (PLACE, None),  # exported for others
        (TORCHRUN, there("torchrun", 5, 8, 1, 29500)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}, here("torchrun", 5, 8, 5, 29500)),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            Joined("torchrun", 5, 8, 1, "n0", 29500, True),  # its agent keeps the store
        ),
        ({**TORCHRUN, **SALLOC}, there("torchrun", 5, 8, 1, 29500)),
        ({**TORCHRUN, **SRUN}, there("torchrun", 5, 8, 1, 29500)),  # one torchrun per task
        ({**SRUN, **ALONE}, here("torchrun", 0, 1, 0, 29500)),  # torchrun --standalone in each task
        (HAND, there("torchrun", 1, 2, None, 29500)),
        ({**HAND, "MASTER_ADDR": "[fd00::2]"}, there("torchrun", 1, 2, None, 29500, "fd00::2")),
        ({**HAND, "MASTER_ADDR": "fe80::1%eth0"}, there("torchrun", 1, 2, None, 29500, "fe80::1%eth0")),
        ({**HAND, "MASTER_ADDR": "[::1]"}, here("torchrun", 1, 2, None, 29500)),
        ({**HAND, "MASTER_ADDR": "localhost"}, here("torchrun", 1, 2, None, 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, here("torchrun", 0, 1, 0, None)),
        ({**HAND, **SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, there("srun", 3, 4, 1, 29500)),
        (BATCH, None),
        (SALLOC, None),
        (less(SALLOC, "SLURM_STEP_NUM_TASKS"), None),
        ({**SALLOC, "PMIX_RANK": "0"}, None),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --ntasks=1
        (SRUN, there("srun", 3, 4, 1, 20041)),
        ({**SRUN, "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "n1"}, there("srun", 3, 4, 1, 22059, "n1")),
        ({**SRUN, "SLURM_JOB_NODELIST": "n[2-3]"}, there("srun", 3, 4, 1, 20041, "n2")),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, here("srun", 3, 4, 1, 20041)),
        ({**less(SRUN, "SLURM_JOB_ID", "SLURM_JOB_NODELIST"), **PLACE}, there("srun", 3, 4, 1, 29500)),
        (less(SRUN, "SLURM_LOCALID"), there("srun", 3, 4, None, 20041)),
        (less(SRUN, "SLURM_STEP_NUM_TASKS"), there("srun", 3, 4, 1, 20041)),
        ({**SRUN, "WORLD_SIZE": "4"}, there("srun", 3, 4, 1, 20041)),
        ({**SRUN, "PMIX_RANK": "3"}, there("srun", 3, 4, 1, 20041)),  # srun --mpi=pmix
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, there("srun", 3, 4, 1, 20041)),  # srun --mpi=pmi2
        (OPEN_MPI, here("mpirun", 1, 2, 1, None)),
        ({**BATCH, **OPEN_MPI}, here("mpirun", 1, 2, 1, None)),
        ({**OPEN_MPI, **APART, **PLACE}, there("mpirun", 1, 2, 0, 29500)),
        ({**SRUN, **DAEMON, **OPEN_MPI, **PLACE}, here("mpirun", 1, 2, 1, 29500)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (HYDRA, here("mpirun", 1, 2, 1, None)),
        ({**HYDRA, "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", **PLACE}, there("mpirun", 1, 2, 0, 29500)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", **PLACE}, there("mpirun", 1, 2, None, 29500)),
    ],
)  # fmt: skip
def test_the_place_that_a_launcher_gives(environment, place):
    assert read(environment, first_host=lambda nodes: {"n[2-3]": "n2"}[nodes]) == place


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set, but RANK=0 is"),
        ({"WORLD_SIZE": "4", **PLACE}, "RANK: not set, but WORLD_SIZE=4 is"),
        ({"LOCAL_RANK": "1"}, "RANK: not set, but LOCAL_RANK=1 is"),
        (less(HAND, "MASTER_ADDR"), "MASTER_ADDR: not set, and torchrun started several"),
        (less(HAND, "MASTER_PORT"), "MASTER_PORT: not set"),
        ({**HAND, "RANK": "x"}, "RANK: 'x' is no whole number of 0 or more"),
        ({**HAND, "RANK": "-1"}, "RANK: '-1' is no whole number"),
        ({**HAND, "RANK": ""}, "RANK: '' is no whole number"),
        ({**HAND, "RANK": "9" * 5000}, "RANK: '999"),
        ({**HAND, "RANK": "2"}, "RANK: 2, but WORLD_SIZE=2; ranks are 0 to 1"),
        ({**HAND, "WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is no whole number of 1 or more"),
        ({**HAND, "LOCAL_RANK": "2"}, "LOCAL_RANK: 2, but there are 2 processes"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK: 4, but there are 4 processes"),
        ({**HAND, "MASTER_PORT": "0"}, "MASTER_PORT: 0 is no port .*--standalone"),
        ({**HAND, "MASTER_PORT": "70000"}, "MASTER_PORT: 70000 is no port"),
        ({**HAND, "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no whole number"),
        ({**HAND, "MASTER_ADDR": ""}, "MASTER_ADDR: '' is neither"),
        ({**HAND, "MASTER_ADDR": "n0:29500"}, "MASTER_ADDR: 'n0:29500' is neither .* a port goes into MASTER_PORT"),
        ({**HAND, "MASTER_ADDR": "[n0]"}, r"MASTER_ADDR: '\[n0\]' is neither"),
        ({**HAND, "MASTER_ADDR": "n0 n1"}, "MASTER_ADDR: 'n0 n1' is neither"),
        ({**BATCH, "SLURM_PROCID": "1"}, "SLURM_STEP_ID: not set, but SLURM_PROCID=1 tells of several"),
        (less(SRUN, "SLURM_STEP_ID"), "SLURM_STEP_ID: not set, but SLURM_PROCID=3"),
        (less({**SRUN, "SLURM_PROCID": "0"}, "SLURM_STEP_ID"), "SLURM_STEP_ID: not set, but SLURM_STEP_NUM_TASKS=4"),
        (less(SRUN, "SLURM_PROCID"), "SLURM_PROCID: not set, but SLURM_STEP_ID=0"),
        (less(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_STEP_NUM_TASKS: not set"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_PROCID: 3, but SLURM_STEP_NUM_TASKS=1"),
        ({**SRUN, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID: 'batch' is no whole number"),
        ({**SRUN, "SLURM_LOCALID": "a"}, "SLURM_LOCALID: 'a'"),
        (less(SRUN, "SLURM_JOB_NODELIST"), "MASTER_ADDR: not set, nor SLURM_JOB_NODELIST"),
        (less(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID: not set, .* set MASTER_PORT"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE: 1, but srun started 4 processes: of another run"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE: 8 contradicts srun, which says 4"),
        ({**SRUN, "RANK": "0"}, "RANK: 0 contradicts srun, which says 3"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR: not set, and mpirun started several"),
        ({**less(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), "MASTER_ADDR": "n0"}, "MASTER_PORT: not set"),
        (less(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE: not set, but OMPI_COMM_WORLD_RANK=1 is"),
        (less(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK: not set, but OMPI_COMM_WORLD_SIZE=2 is"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "7"}, "OMPI_COMM_WORLD_RANK: 7, but OMPI_COMM_WORLD_SIZE=2"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE: 1, but mpirun started 2 processes"),
        ({"PMIX_RANK": "1"}, "OMPI_COMM_WORLD_SIZE: not set, but PMIX_RANK=1 is"),
        ({"PMI_RANK": "1"}, "PMI_SIZE: not set, but PMI_RANK=1 is"),
        ({**HYDRA, "PMI_SIZE": "two"}, "PMI_SIZE: 'two' is no whole number"),
    ],
)  # fmt: skip
def test_what_is_set_in_part_or_wrong(environment, named):
    with pytest.raises(UserError, match=rf"^{named}") as refused:
        read(environment, first_host=str)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("environment", [SRUN, OPEN_MPI, HYDRA, {"RANK": "0", "WORLD_SIZE": "1"}, HAND])
def test_what_is_set_for_torch_reads_the_same(environment, monkeypatch):
    """Twice in one process: before anything starts, and where the ranks meet."""
    monkeypatch.setattr(os, "environ", dict(environment))
    first = join()
    again = join()
    assert (again.rank, again.world_size, again.local_rank) == (first.rank, first.world_size, first.local_rank)
    assert (again.address, again.port, again.one_machine) == (first.address, first.port, first.one_machine)
    assert {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def test_ranks_of_mpirun_find_one_port(tmp_path):
    """Also where a shell is between the two, as the launcher starts a script."""
    code = "import os; from dsv3_train.runtime.launcher import join; join(); print(os.environ['MASTER_PORT'])"
    ranks = []
    for rank, shell in (("0", False), ("1", True)):
        environment = {**less(dict(os.environ), *launcher.VARIABLES), **HYDRA, "PMI_RANK": rank}
        command = [sys.executable, "-c", code]
        command = ["sh", "-c", 'true; "$@"; exit $?', "sh", *command] if shell else command
        ranks.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert ranks == [f"{20000 + os.getpid() % 12000}\n"] * 2
