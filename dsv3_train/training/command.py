"""What `dsv3 train` does before and around the ranks' work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.directory import complete, resolve
from dsv3_train.checkpoint.hf.origin import PREFIX
from dsv3_train.data import manifest
from dsv3_train.data.prepare import changed_inputs
from dsv3_train.errors import UserError
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.ready import refuse_unready
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import deterministic, distributed, heartbeat, preflight_run
from dsv3_train.runtime.exits import PREEMPTED
from dsv3_train.runtime.launch import ATTEMPT, Restarts, launch
from dsv3_train.runtime.launcher import join
from dsv3_train.runtime.rendezvous import Absent
from dsv3_train.runtime.signals import StopRequest, end_when_asked
from dsv3_train.runtime.watchdog import Watchdog
from dsv3_train.training import data_identity
from dsv3_train.training.indices import ready_data
from dsv3_train.training.machine import refuse_machine, told_when_full
from dsv3_train.training.rundir import hold, missing, undo, write_state
from dsv3_train.training.startup import Startup


def run(ref: str, overrides: list[str]) -> None:
    """Train `ref` in its run directory, from the newest checkpoint there.

    Raises:
        UserError: recipe, data, checkpoint or machine are at fault.
    """
    startup = Startup()
    end_when_asked()  # until there is something to save
    recipe = load(ref, overrides)
    refuse_unready(recipe)
    Schedules(recipe)  # whether it goes to the end
    device = distributed.device_of(recipe)
    startup.mark("interpreter, torch and recipe")
    joined = join() is not None
    if not joined:  # before any process starts; under a launcher, the ranks see to it
        _refuse_begin(recipe)
        refuse_machine(recipe, device)
        ready_data(recipe)
        startup.mark("data")
    if device == "cpu" or joined:
        _import(recipe, device)  # once, before ranks are forked
        startup.mark("imports")
    run_dir = recipe.run_dir
    restarts = Restarts(
        recipe.faults.max_restarts, run_dir, lambda: [path.name for path in complete(run_dir / "checkpoints")]
    )
    launch(
        lambda: _on_rank(recipe, device, startup, joined),
        recipe.parallel.world_size,
        device,
        restarts if recipe.faults.max_restarts else None,
    )


def _refuse_begin(recipe: Recipe) -> None:
    """Refuse a checkpoint to begin with that is not there, before there is a run directory."""
    begin = recipe.checkpoint.load
    if begin and not begin.startswith(PREFIX) and not complete(recipe.run_dir / "checkpoints"):
        resolve(Path(begin))


def _wait_for_data(recipe: Recipe) -> None:
    """Until rank 0 has prepared it, which takes longer than collectives wait. Its manifest comes last."""
    while recipe.data.prepare and manifest.load(recipe.data.prepare.output) is None:
        time.sleep(1)


def _import(recipe: Recipe, device: str) -> None:
    distributed.prepare_import(device, recipe)
    from dsv3_train.training import run  # noqa: F401


def _on_rank(recipe: Recipe, device: str, startup: Startup, joined: bool) -> None:
    """Train; rank 0 leaves in RUN_DIR/state how that ended, for whoever starts runs (runtime/slurm.py)."""
    leader = os.environ["RANK"] == "0"
    made = missing(recipe.run_dir) if leader else []  # other ranks make nothing before they have met this one
    ended = "failed"
    try:
        _train_on_rank(recipe, device, startup, joined)
        ended = "finished"
    except Absent:
        undo(made)
        raise
    except UserError:
        ended = "refused"
        undo(made)
        raise
    except SystemExit as stop:
        ended = "preempted" if stop.code == PREEMPTED else "failed"
        raise
    finally:
        if leader and recipe.run_dir.is_dir():
            write_state(recipe.run_dir, ended)


def _train_on_rank(recipe: Recipe, device: str, startup: Startup, joined: bool) -> None:
    if os.environ.get(ATTEMPT, "0") != "0":
        startup.again()
    stop = StopRequest()
    if recipe.runtime.deterministic:
        deterministic.prepare(device)
    _import(recipe, device)
    import torch

    from dsv3_train.checkpoint.state import topology
    from dsv3_train.training.run import Run
    from dsv3_train.training.rundir import open_run_dir

    run_dir = recipe.run_dir
    if os.environ["RANK"] == "0" and run_dir.is_dir():
        with contextlib.suppress(OSError):  # `join` says on which node the disk cannot be written
            hold(run_dir)  # before heartbeats are written in it
    notes = preflight_run.join(recipe, device, run_dir)
    startup.mark("process groups")
    beat = heartbeat.start(run_dir / "heartbeats", torch.distributed.get_rank())
    leader = torch.distributed.get_rank() == 0
    if leader:
        if joined:
            ready_data(recipe)
        notes += open_run_dir(run_dir, recipe, dump(recipe), topology(recipe))
        notes += tokenizer_home.keep(run_dir, recipe)
        notes += data_identity.keep(recipe, run_dir)
        if recipe.data.prepare and (changes := changed_inputs(recipe.data.prepare)):
            notes.append(f"{recipe.data.prepare.output}: {changes}; the run takes it as it is")
        write_state(run_dir, "running")
    elif joined:
        _wait_for_data(recipe)
    torch.distributed.barrier()
    with told_when_full(recipe):
        run = Run(recipe, run_dir, device, startup, notes, stop)
    first = run.position.step
    watchdog = Watchdog(beat, run_dir, recipe.parallel.world_size, recipe.faults.hang_seconds)
    if recipe.faults.hang_seconds:
        watchdog.start()
    stop.heed()
    preempted = None
    try:
        with told_when_full(recipe, lambda: run.position.step > first):
            run.train()
    except SystemExit as ended:
        if ended.code != PREEMPTED:
            raise
        preempted = ended  # all ranks are here, and leave the process group as at a run's end
    finally:
        watchdog.stop()
        # Data workers ignore TERM, by which they would be ended at exit should one not answer; torch's handler
        # raises, wherever this process then is, when one dies.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
    if leader:  # before any rank ends: srun kills the others soon after the first
        write_state(run_dir, "preempted" if preempted else "finished")
    torch.distributed.barrier()
    distributed.stop()
    if preempted:
        raise preempted
