"""The run directory: what a run was, beside what it left."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dsv3_train import __version__
from dsv3_train.checkpoint.directory import complete
from dsv3_train.errors import UserError
from dsv3_train.locks import NO_LOCKS
from dsv3_train.recipe.load import diff, load
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.environment import cpu_name, versions
from dsv3_train.training.speed import CONVENTION

_LOCK_SECONDS, _LOCK_SECONDS_ELSEWHERE = 5.0, 120.0
"""For a run that was killed just now to be gone, here; and for a file system to give up a machine that is lost."""
_VARIABLES = ("NVTE_", "NCCL_", "TORCH_NCCL_", "PYTORCH_", "CUDA_", "CUBLAS_")

_held: int | None = None
"""Descriptor of the lock of the run directory that is this process's own; it ends with the process."""


def open_run_dir(run_dir: Path, recipe: Recipe, resolved: str, topology: dict[str, Any]) -> list[str]:
    """Make or reopen a run directory, and `hold` it: `recipe.yaml` (resolved), `environment.json`, `topology.json`.

    A recipe that changed since the directory's last run takes the place of the old one, which is kept as
    `recipe-before-STEP.yaml`: what trained up to checkpoint STEP.

    Returns what differs from the recipe that ran here before, one line per setting.

    Raises:
        UserError: another run is in the directory, another model was trained here, or it cannot be written.
    """
    try:
        notes = hold(run_dir)
        notes += _keep_recipe_before(run_dir, recipe)
        _write(run_dir / "recipe.yaml", resolved, recipe.file_mode)
        _write(run_dir / "topology.json", json.dumps(topology, indent=1))
        _write(run_dir / "environment.json", json.dumps(environment(), indent=1))
    except OSError as error:
        raise UserError(f"runtime.run_dir: {run_dir} cannot be written ({error.strerror}); set another") from None
    return notes


def hold(run_dir: Path, wait: bool = True) -> list[str]:
    """Keep other runs out of a directory, made if need be, until this process ends or holds another.

    RUN_DIR/lock says who holds it; children that this process forks do not. Works across machines where the file
    system does (NFS, Lustre with flock).

    Returns a line for the log where it has no locks.

    Raises:
        UserError: another process holds it, `wait`: for some seconds still.
        OSError: the directory cannot be written.
    """
    global _held
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    if _held is not None and os.path.samestat(os.fstat(lock), os.fstat(_held)):
        os.close(lock)
        return []
    try:
        holder = os.pread(lock, 256, 0).decode(errors="replace").strip() or "another process"
        here = holder.endswith(f" on {platform.node()}")
        if not _locked(lock, (_LOCK_SECONDS if here else _LOCK_SECONDS_ELSEWHERE) if wait else 0.0):
            raise UserError(f"{run_dir}: in use by {holder}; set another runtime.run_dir, or stop that run")
    except BaseException as error:
        os.close(lock)
        if isinstance(error, OSError) and error.errno in NO_LOCKS:
            return [f"{run_dir}: its file system has no locks ({error.strerror}): a second run here would not be told"]
        raise
    with contextlib.suppress(OSError):  # a full disk: the lock holds without
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    _let_go()
    _held = lock
    return []


def missing(run_dir: Path) -> list[Path]:
    """The run directory and folders above it, as far as they are not there yet: what a command makes."""
    return list(itertools.takewhile(lambda folder: not folder.exists(), [run_dir, *run_dir.parents]))


def undo(made: list[Path]) -> None:
    """Remove what a refused command has made (`missing`, before it), unless something was trained in it."""
    if not made:
        return
    kept = [*made[0].glob("checkpoints/*"), made[0] / "incidents.jsonl", made[0] / "metrics.jsonl"]
    if any(path.is_dir() or (path.is_file() and path.stat().st_size) for path in kept):
        return
    shutil.rmtree(made[0], ignore_errors=True)
    for folder in made[1:]:
        with contextlib.suppress(OSError):  # others have put something there
            folder.rmdir()


def _locked(lock: int, seconds: float) -> bool:
    """Lock an open file, if that can be had within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.1)


def _let_go() -> None:
    global _held
    if _held is not None:
        os.close(_held)
        _held = None


os.register_at_fork(after_in_child=_let_go)  # a writer or data worker that outlives a killed rank keeps nobody out


def _keep_recipe_before(run_dir: Path, recipe: Recipe) -> list[str]:
    latest = run_dir / "recipe.yaml"
    if not latest.is_file():
        return []
    changes = diff(load(str(latest)), recipe)
    other_model = [key for key, _, _ in changes if key.split(".")[0] == "model"]
    if other_model:
        raise UserError(
            f"{latest}: another model was trained here ({', '.join(other_model)}); "
            "set another runtime.run_dir, or remove this one"
        )
    checkpoints = complete(run_dir / "checkpoints")
    kept = run_dir / f"recipe-before-{checkpoints[-1].name if checkpoints else 'step_00000000'}.yaml"
    # One that is there already led to this checkpoint; what was tried since left nothing.
    if changes and not kept.exists():
        _write(kept, latest.read_text(encoding="utf-8"), stat.S_IMODE(latest.stat().st_mode))
    return [f"recipe changed: {key} was {before}, is {now}" for key, before, now in changes]


def write_state(run_dir: Path, state: str) -> None:
    """Leave in RUN_DIR/state how the run is: running, preempted, finished, refused or failed."""
    # A full disk, or another run in the directory, whose state it is: the exit code tells as much.
    with contextlib.suppress(OSError, UserError):
        hold(run_dir, wait=False)
        _write(run_dir / "state", state + "\n")


def environment() -> dict[str, Any]:
    """Versions of all parts, the machine, the command line, the variables that the libraries under it read, and what
    TFLOPS and MFU mean in this run."""
    import torch

    return {
        "dsv3_train": __version__,
        "commit": _commit(),
        "versions": versions(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "speed_convention": CONVENTION,
    }


def _commit() -> str | None:
    """Of the checkout that this code runs from; None where it was installed otherwise."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _write(path: Path, text: str, mode: int = 0o666) -> None:
    """As `whole.write`, and an error of the disk as such."""
    unfinished = path.with_name(path.name + ".unfinished")
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(unfinished, path)
