"""Training the runs of a comparison: each a `dsv3 train` of its own, several at a time, GPUs shared out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv3_train.errors import UserError
from dsv3_train.lines import newest_first
from dsv3_train.numerics.plan import Planned

_TRAIN = (sys.executable, "-m", "dsv3_cli.main", "train")
_LIBC = ctypes.CDLL(None)
_GRACE_SECONDS = 60.0
"""For runs that are asked to stop: they save a checkpoint."""


@dataclass
class _Job:
    planned: Planned
    slot: int
    process: subprocess.Popen
    started: float


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here; empty without GPUs."""
    import torch

    if not (count := torch.cuda.device_count()):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def share(devices: Sequence[str], each: int, slot: int) -> list[str]:
    """The GPUs of one place among those that train at the same time, `each` of them: places take turns.

    Fewer than `each`: all, and `dsv3 train` says that they are too few.
    """
    groups = max(1, len(devices) // each)
    first = slot % groups * each
    return list(devices[first : first + each])


def train(plan: Sequence[Planned], jobs: int, devices: Sequence[str], console: Console) -> None:
    """Train what is not finished yet, `jobs` at a time.

    Stopped on the way (interrupt, TERM, a failure), the runs under way save themselves; the next call goes on.

    Raises:
        UserError: a run did not get to its end.
    """
    waiting = [planned for planned in plan if not planned.finished]
    for planned in plan:
        if planned.finished:
            console.print(f"{planned.run_dir}: finished before", highlight=False)
    running: list[_Job] = []
    with _stoppable(), _bars(console) as bars:
        tasks = {
            planned.run_dir: bars.add_task(planned.run_dir.name, total=None, loss=float("nan")) for planned in waiting
        }
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    taken = {job.slot for job in running}
                    slot = next(number for number in range(jobs) if number not in taken)
                    running.append(_start(waiting.pop(0), slot, devices))
                    console.print(f"{running[-1].planned.run_dir}: training", highlight=False)
                time.sleep(0.5)
                for job in list(running):
                    _advance(bars, tasks[job.planned.run_dir], job.planned)
                    if job.process.poll() is None:
                        continue
                    running.remove(job)
                    if job.process.returncode != 0 or not job.planned.finished:
                        _refuse(job)
                    seconds = time.monotonic() - job.started
                    console.print(f"{job.planned.run_dir}: finished in {seconds:.0f} s", highlight=False)
        finally:
            _stop(running)


def _start(planned: Planned, slot: int, devices: Sequence[str]) -> _Job:
    environment = dict(os.environ)
    if devices and planned.recipe.runtime.device != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share(devices, planned.recipe.parallel.world_size, slot))
    command = [*_TRAIN, planned.ref, *planned.overrides]
    try:
        planned.log.parent.mkdir(parents=True, exist_ok=True)
        with planned.log.open("ab") as log:
            # A session of its own: an interrupt on the terminal is ours alone, and `_stop` passes it on. And should
            # this process be killed, the kernel asks the run to stop.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )
    except OSError as error:
        raise UserError(f"{planned.log}: cannot write ({error.strerror or error}); set another --out") from None
    return _Job(planned, slot, process, time.monotonic())


def _stop_with_parent() -> None:
    """In the run's process, before it begins."""
    if sys.platform == "linux":
        _LIBC.prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def _refuse(job: _Job) -> NoReturn:
    lines = job.planned.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    why = lines[-1] if lines else "it said nothing"
    code = job.process.returncode
    raise UserError(
        f"{job.planned.run_dir}: dsv3 train ended with exit code {code}: {why} (all of it: {job.planned.log})"
    )


def _stop(running: list[_Job]) -> None:
    """Ask for checkpoints and ends; insist after a while."""
    for job in running:
        job.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for job in running:
        try:
            job.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """TERM ends this process as an exception does, so that it takes its runs along."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _advance(bars: Progress, task, planned: Planned) -> None:
    """To the newest step in the run's metrics."""
    with contextlib.suppress(OSError):  # not there yet
        for _, line in newest_first(planned.run_dir / "metrics.jsonl"):
            if line and line.get("kind") == "step":
                bars.update(task, completed=line["step"], total=line["total_steps"], loss=line["loss"] or float("nan"))
                return
