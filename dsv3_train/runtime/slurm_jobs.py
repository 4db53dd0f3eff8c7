"""Submitting a recipe to SLURM, and what becomes of its jobs. Every path to SLURM goes through `_slurm`."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_train.checkpoint.directory import complete
from dsv3_train.errors import UserError
from dsv3_train.lines import newest_step
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.load import dump, load
from dsv3_train.recipe.ready import refuse_unready
from dsv3_train.runtime import cluster as site
from dsv3_train.runtime import incidents
from dsv3_train.runtime.slurm import FOLDER, Job, nodes, refuse_unlike, script
from dsv3_train.whole import write

_JOB = re.compile(r"[0-9]{1,18}(_[0-9]{1,9})?")
"""A job's number; of an array's task, with its own."""
_MOST_RUNS = 1000
"""Of a sweep: what SLURM takes by default (MaxArraySize)."""


@dataclass(frozen=True)
class Prepared:
    """A job that could be submitted."""

    job: Job
    script: str
    resolved: list[str]
    """The recipes as YAML, which may hold what is not for everyone (`Recipe.file_mode`)."""

    def lay_out(self) -> list[Path]:
        """Write recipe and script into the run directories, where the job looks for them; their folders there.

        Raises:
            UserError: a directory cannot be written.
        """
        folders = [path / FOLDER for path in self.job.run_dirs]
        try:
            for folder, recipe, text in zip(folders, self.job.recipes, self.resolved, strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / "recipe.yaml", text, recipe.file_mode)
                write(folder / "script.sh", self.script)
                for mark in ("finished", "failures"):  # of jobs before
                    (folder / mark).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{folders[0]}: cannot be written ({error.strerror}); set runtime.run_dir") from None
        return folders

    def submit(self, chain: int = 1) -> list[str]:
        """Lay the job out and hand it to sbatch, `chain` times in a row; the jobs' numbers.

        Raises:
            UserError: SLURM is not here or refuses; or a directory cannot be written, or has jobs in the queue.
        """
        for run_dir in self.job.run_dirs:
            if (run_dir / FOLDER / "jobs").is_file() and (queued := _queue(_jobs(run_dir))):
                raise UserError(
                    f"{run_dir}: has a job in the queue ({' '.join(queued.split())}), and two in one run directory "
                    f"would stop each other; dsv3 slurm cancel {run_dir}, or set another runtime.run_dir"
                )
        folders = self.lay_out()
        jobs: list[str] = []
        for _ in range(chain):
            after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            told = _slurm("sbatch", "--parsable", *after, str(folders[0] / "script.sh")).strip().split(";")[0]
            if not _JOB.fullmatch(told):
                raise UserError(f"sbatch: no job's number in {told!r}; submitted were {', '.join(jobs) or 'none'}")
            jobs.append(told)
        for number, folder in enumerate(folders):
            own = self.job.of_run(number, jobs)
            (folder / "jobs").write_text("".join(f"{job}\n" for job in own), encoding="utf-8")
        return jobs


def prepare(
    ref: str,
    overrides: list[str],
    sweep: list[str],
    given: dict[str, str | None],
    asked_nodes: int | None = None,
    after: str | None = None,
    max_requeues: int = 100,
) -> Prepared:
    """Check everything that can be checked before a job waits in a queue.

    Args:
        sweep: `key=v1,v2` each; all combinations.
        given: partition, account, time, container: what is not None wins over the site's file.
        after: a job's number.

    Raises:
        UserError: the recipe (in any combination), the site's file, the time or the number of nodes is at fault, or the
            combinations cannot share a script.
    """
    defaults = site.load().model_copy(update={name: value for name, value in given.items() if value is not None})
    here = _here()
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep: {axis!r}: give KEY=VALUE,VALUE, as schedule.lr=1e-4,2e-4")
        axes.append([f"{key}={value}" for value in values.split(",")])
    if (runs := math.prod(map(len, axes))) > _MOST_RUNS:
        raise UserError(f"--sweep: {runs} runs are more than the {_MOST_RUNS} of one array; submit it in parts")
    recipes, run_dirs = [], []
    for number, combination in enumerate(itertools.product(*axes)):
        recipe = load(ref, [*overrides, *combination])
        refuse_unready(recipe)
        Schedules(recipe)
        run_dir = recipe.runtime.run_dir.format(name=recipe.name)
        if axes:
            run_dir = f"{run_dir}-{number}"
            recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"run_dir": run_dir})})
        recipes.append(recipe)
        run_dirs.append(here / run_dir)
    refuse_unlike(recipes, sweep)
    lead = recipes[0].faults.stop_lead_seconds
    if defaults.time is not None:
        _refuse_time(defaults.time, "--time" if given.get("time") else f"{site.file()}: time", lead)
    nodes(recipes[0], asked_nodes)
    if after is not None and not _JOB.fullmatch(after):
        raise UserError(f"--after: {after!r} is no job's number, as 41 or 41_7")
    job = Job(recipes, run_dirs, here, max_requeues=max_requeues, after=after)
    # On the nodes this very installation is used, unless a container or the site's setup brings its own.
    if not defaults.container and not defaults.setup and not defaults.modules:
        job = replace(job, command=(sys.executable, "-m", "dsv3_cli.main"))
    return Prepared(job, script(job, defaults), [dump(recipe) for recipe in recipes])


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:
        raise UserError("the working directory is gone; change to another") from None


def _refuse_time(time: str, where: str, lead: int) -> None:
    try:
        left = site.seconds(time) - lead
    except ValueError as error:
        raise UserError(f"{where}: {time!r}: {error}") from None
    if left <= 0:
        raise UserError(
            f"{where}: {time}: a job is told to save {lead} s before its time is over (faults.stop_lead_seconds), "
            "which would be at once; give it more time, or lower that"
        )


@dataclass(frozen=True)
class Status:
    """How a run does."""

    job: str | None
    """The newest; JOB_TASK if the run is one of a sweep."""
    queue: str | None
    """What squeue says of it: state, restarts, why it waits or on which nodes it runs."""
    state: str
    """`running`, `preempted`, `finished`, or `none`: as rank 0 left it."""
    step: int
    checkpoint: str | None
    incidents: list[dict[str, Any]]
    """The last ten."""


def status(run: str) -> Status:
    """Look at a run directory and into the queue.

    Raises:
        UserError: there is no such run, or SLURM does not answer.
    """
    run_dir = _run_dir(run)
    jobs = _jobs(run_dir)
    state, whole = run_dir / "state", complete(run_dir / "checkpoints")
    return Status(
        job=jobs[-1],
        queue=_queue(jobs),
        state=_text(state).strip() if state.is_file() else "none",
        step=newest_step(run_dir / "metrics.jsonl"),
        checkpoint=whole[-1].name if whole else None,
        incidents=incidents.read(run_dir, 10),
    )


def _queue(jobs: list[str]) -> str | None:
    # Only the long --Format counts restarts. A column pads its words up to its width, and cuts longer ones.
    columns = "--Format=JobArrayID:40,State:20,RestartCnt:10,ReasonList:1000"
    lines = _slurm("squeue", "--noheader", columns, f"--jobs={','.join(jobs)}", check=False)
    told = []
    for line in lines.splitlines():
        if len(words := line.split(maxsplit=3)) < 3:
            raise UserError(f"squeue: {line!r} is not what it was asked for: job, state, restarts, reason")
        job, state, restarts, *reason = words
        told.append(" ".join([job, state, f"restarts={restarts}", *reason]).rstrip())
    return "\n".join(told) or None


def output(run: str) -> Path:
    """The newest output file of a run's jobs.

    Raises:
        UserError: there is none yet.
    """
    run_dir = _run_dir(run)
    jobs = _jobs(run_dir)
    found = list((run_dir / FOLDER).glob("*.out"))
    found += [path for job in jobs if (path := run_dir.parent / f"sweep-{job}.out").is_file()]
    if not found:
        raise UserError(f"{run_dir / FOLDER}: no output yet; see dsv3 slurm status {run}")
    return max(found, key=lambda path: path.stat().st_mtime)


def cancel(run: str) -> list[str]:
    """End a run's jobs for good, in a sweep its own tasks only; their numbers.

    Raises:
        UserError: there is no such run, or SLURM refuses.
    """
    run_dir = _run_dir(run)
    jobs = _jobs(run_dir)
    for job in jobs:  # else the script, told to end, would queue itself again
        (run_dir / FOLDER / f"cancelled.{job}").touch()
    _slurm("scancel", *jobs)
    return jobs


def _run_dir(run: str) -> Path:
    path = Path(run)
    if not (path / FOLDER).is_dir():
        raise UserError(f"{run}: no run that was submitted with dsv3 slurm submit; give its run directory")
    return path


def _jobs(run_dir: Path) -> list[str]:
    path = run_dir / FOLDER / "jobs"
    if not path.is_file():
        raise UserError(f"{path}: missing: the run was prepared, but never submitted")
    jobs = _text(path).split()
    if not jobs or not all(map(_JOB.fullmatch, jobs)):
        raise UserError(f"{path}: has to be numbers of jobs, one a line; submit again, or end the jobs with scancel")
    return jobs


def _text(path: Path) -> str:
    """Of a small file."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})") from None


def _slurm(program: str, *arguments: str, check: bool = True) -> str:
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise UserError(f"{program}: not found; submit where SLURM is installed, or look with --dry-run") from None
    except OSError as error:
        raise UserError(f"{program}: cannot be started ({error.strerror})") from None
    if done.returncode and check:
        raise UserError(f"{program}: {' '.join(done.stderr.split())}")
    return done.stdout
