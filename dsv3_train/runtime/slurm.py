"""SLURM: the batch script of a run, which saves before its time is over, goes back into the queue and goes on."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from dsv3_train.errors import UNSEEN, UserError
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.cluster import Cluster
from dsv3_train.runtime.exits import PREEMPTED
from dsv3_train.runtime.gpu_environment import gpu_environment
from dsv3_train.runtime.launcher import MEETING

FOLDER = "slurm"
"""Of a run directory: the submitted recipe, job numbers, output, and what the script remembers between starts."""


@dataclass(frozen=True)
class Job:
    """What to submit: one run, or a sweep over several as an array."""

    recipes: list[Recipe]
    """Resolved; they differ in the sweep's keys and in `runtime.run_dir`."""
    run_dirs: list[Path]
    """Absolute, one per recipe."""
    directory: Path
    """Where the job runs: relative paths of the recipe count from here."""
    command: tuple[str, ...] = ("dsv3",)
    """What starts this program on a node."""
    max_requeues: int = 100
    after: Union[str, None] = None
    """Begin when this job has ended."""

    @property
    def array(self) -> bool:
        """Whether SLURM is given several runs at once."""
        return len(self.recipes) > 1

    def of_run(self, number: int, jobs: list[str]) -> list[str]:
        """What SLURM calls one run's part of submitted jobs: JOB_TASK in an array."""
        return [f"{job}_{number}" for job in jobs] if self.array else jobs


def nodes(recipe: Recipe, asked: int | None = None) -> int:
    """Nodes that a recipe takes.

    Raises:
        UserError: `asked` is another number, or the processes do not fill the nodes.
    """
    world, per_node = recipe.parallel.world_size, recipe.parallel.gpus_per_node
    if world > per_node and world % per_node:
        raise UserError(
            f"parallel.world_size: {world} processes do not fill nodes of {per_node} (parallel.gpus_per_node); "
            f"set it to {world // per_node * per_node} or {(world // per_node + 1) * per_node}"
        )
    needed = -(-world // per_node)
    if asked not in (None, needed):
        raise UserError(
            f"--nodes: {asked} nodes of {per_node} (parallel.gpus_per_node), but parallel.world_size={world} takes "
            f"{needed}; set parallel.world_size={asked * per_node}, or leave --nodes out"
        )
    return needed


def refuse_unlike(recipes: list[Recipe], sweep: list[str]) -> None:
    """Refuse a sweep whose runs need scripts that differ: an array has one script, of the first run's values.

    Raises:
        UserError: naming the sweep and the first value in which a run differs.
    """
    first = _of_script(recipes[0])
    for number, recipe in enumerate(recipes[1:], 1):
        other = _of_script(recipe)
        for key in {**first, **other}:
            here, there = first.get(key, "not set"), other.get(key, "not set")
            if here != there:
                raise UserError(
                    f"--sweep {' '.join(sweep)}: {key} is {here} in run 0 and {there} in run {number}, and one script "
                    "starts all runs of a sweep; submit these apart"
                )


def _of_script(recipe: Recipe) -> dict[str, object]:
    """What `script` takes from a recipe."""
    on_gpu = _on_gpu(recipe)
    return {
        "parallel.world_size": recipe.parallel.world_size,
        "parallel.gpus_per_node": recipe.parallel.gpus_per_node,
        "runtime.device": "auto or cuda" if on_gpu else "cpu",
        "the folder of runtime.run_dir": Path(recipe.runtime.run_dir).parent,
        "faults.max_restarts": recipe.faults.max_restarts,
        "faults.stop_lead_seconds": recipe.faults.stop_lead_seconds,
        **(gpu_environment(recipe) if on_gpu else {}),
    }


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.runtime.device != "cpu"


def script(job: Job, cluster: Cluster) -> str:
    """The text for sbatch; of several recipes, which are alike (`refuse_unlike`), the first one's values.

    Whatever a recipe, a path or an option says stands in quotes; only the site's file, the user's own, gives shell.

    Raises:
        UserError: a path or an option cannot stand in a batch script.
    """
    recipe, array = job.recipes[0], job.array
    on_gpu = _on_gpu(recipe)
    world, per_node = recipe.parallel.world_size, recipe.parallel.gpus_per_node
    lines = ["#!/usr/bin/env bash", *_header(job, cluster, on_gpu, array), "", "set -euo pipefail", ""]
    lines += _places(job, array)
    word = "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')"
    lines += ["", "# A word that nobody can guess: under it the ranks meet.", f"{MEETING}={word}", f"export {MEETING}"]
    lines += [f"module load {' '.join(map(shlex.quote, cluster.modules))}"] if cluster.modules else []
    lines += cluster.setup
    chosen = {**(gpu_environment(recipe) if on_gpu else {"OMP_NUM_THREADS": "1"}), **cluster.environment}
    if chosen:
        lines += ["", "# Where the shell that submitted has a value, that one wins."]
        lines += [_default(name, shlex.quote(value)) for name, value in chosen.items()]
    if on_gpu:
        lines += [
            'mkdir -p "$run_dir/hangs" # NCCL makes no folders',
            _default("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", '"$run_dir/hangs/nccl_rank_"'),
            "# On each node's own disk: compilers of many nodes must not write to one place. Nobody can make it first.",
            _default("TRITON_CACHE_DIR", f'"/tmp/triton-$SLURM_JOB_ID-${MEETING}"'),
        ]
    meeting = {"MASTER_ADDR": "\"${nodes%%$'\\n'*}\"", "MASTER_PORT": "$((20000 + SLURM_JOB_ID % 12000))"}
    lines += [
        "",
        "# Ranks come from SLURM (one task per GPU), the meeting place from here.",
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "unset RANK LOCAL_RANK WORLD_SIZE TORCHELASTIC_RUN_ID # of the shell that submitted: another run's",
        *(f"export {name}={value}" for name, value in meeting.items() if name not in cluster.environment),
        "",
        "# TERM is for the ranks, which save and end; this shell waits for them.",
        "trap : TERM USR1",
        "code=0",
        *_srun(job, cluster, world, per_node, on_gpu),
        "",
        _AFTER.format(
            preempted=PREEMPTED,
            max_requeues=job.max_requeues,
            max_failures=recipe.faults.max_restarts,
            # An array's last task has the array's own number for its SLURM_JOB_ID: all runs would be queued again.
            this="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID",
        ).strip(),
        "",
    ]
    return "\n".join(lines)


def _header(job: Job, cluster: Cluster, on_gpu: bool, array: bool) -> list[str]:
    recipe = job.recipes[0]
    tasks = min(recipe.parallel.world_size, recipe.parallel.gpus_per_node)
    run_dir = job.run_dirs[0].parent if array else job.run_dirs[0] / FOLDER
    # SLURM puts a job's number for %j, in a folder's name too.
    output = str(run_dir).replace("%", "%%") + ("/sweep-%A_%a.out" if array else "/%j.out")
    options = [
        f"--job-name={recipe.name}",
        f"--nodes={nodes(recipe)}",
        f"--ntasks-per-node={tasks}",
        *([f"--gpus-per-node={tasks}"] if on_gpu and cluster.gpus else []),
        *(["--exclusive"] if on_gpu else []),
        *[
            f"--{name}={_word(value, f'--{name}')}"
            for name in ("partition", "account", "time")
            if (value := getattr(cluster, name))
        ],
        f"--chdir={_word(job.directory, 'the working directory')}",
        f"--output={_word(output, 'runtime.run_dir')}",
        "--open-mode=append",
        # Without `B:` the ranks get it, not this shell: long enough before the end for a step and a checkpoint.
        f"--signal=TERM@{recipe.faults.stop_lead_seconds}",
        "--requeue",
        *([f"--array=0-{len(job.recipes) - 1}"] if array else []),
        *cluster.sbatch,
        *([f"--dependency=afterany:{_word(job.after, '--after')}"] if job.after else []),
    ]
    return [f"#SBATCH {option}" for option in options]


def _word(value: object, what: str) -> str:
    """As sbatch reads a word of its directives: in double quotes where need be, inside which nothing can be escaped."""
    text = str(value)
    if UNSEEN.search(text) or re.search(r'[\n\t"\\]', text):
        raise UserError(f'{what}: {text!r}: a batch script takes no ", backslashes and control characters; rename it')
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text) else f'"{text}"'


def _places(job: Job, array: bool) -> list[str]:
    if array:
        listed = [f"  {shlex.quote(str(path))}" for path in job.run_dirs]
        first = ["run_dirs=(", *listed, ")", 'run_dir="${run_dirs[SLURM_ARRAY_TASK_ID]}"']
    else:
        first = [f"run_dir={shlex.quote(str(job.run_dirs[0]))}"]
    return [
        *first,
        f'memory="$run_dir/{FOLDER}"',
        'mkdir -p "$memory"',
        'echo "$SLURM_JOB_ID" >"$memory/running"',
        "",
        "# A chain of jobs, or a requeue that came too late: nothing is left to do.",
        'if [[ -e "$memory/finished" ]]; then',
        "  exit 0",
        "fi",
        'rm -f "$run_dir/state"',
    ]


def _srun(job: Job, cluster: Cluster, world: int, per_node: int, on_gpu: bool) -> list[str]:
    options = [f"--ntasks={world}", f"--ntasks-per-node={min(world, per_node)}"]
    # A rank that fails ends the step at once; one that only ends early, after a minute.
    options += ["--kill-on-bad-exit=1", "--wait=60", *cluster.srun]
    if cluster.container:
        if re.search("[,:]", str(job.directory)):
            raise UserError(f"{job.directory}: a container cannot mount a directory with , or : in its name; rename it")
        mounts = ",".join([f"{job.directory}:{job.directory}", *cluster.mounts])
        options += [f"--container-image={cluster.container}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={job.directory}", "--no-container-mount-home"]
    quoted = " \\\n  ".join(map(shlex.quote, options))
    return [f'srun {quoted} \\\n  {shlex.join(job.command)} train "$memory/recipe.yaml" || code=$?']


_AFTER = """
# Rank 0 leaves in `state` how the run ended: srun's code is the largest of all tasks', those that it killed included.
state=none
if [[ -e "$run_dir/state" ]]; then
  read -r state <"$run_dir/state" || true
  [[ $state =~ ^[a-z]+$ ]] || state=none
fi
newest=$(find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.*' 2>/dev/null | sort | tail -n 1 || true)
echo "ended with exit code $code, state $state, newest checkpoint ${{newest##*/}}"
if [[ $state == finished ]]; then
  touch "$memory/finished"
  exit 0
fi
if [[ -e "$memory/cancelled.{this}" ]]; then
  exit 1
fi
job=$(scontrol show job -o "{this}" || true)
if [[ $job == *JobState=COMPLETING* && $job == *Reason=None* && ! $job =~ PreemptTime=[0-9] ]]; then
  # Not its time, nor a job that goes before it: somebody's scancel.
  echo "cancelled: not queued again"
  exit 1
fi
if [[ $state != preempted && $code -ne {preempted} ]]; then
  if [[ $state == refused ]]; then
    echo "the recipe, the data or the checkpoint is at fault: not queued again"
    exit 2
  fi
  # Failures in a row, without a new checkpoint between them.
  failures=1
  if [[ -e "$memory/failures" ]]; then
    read -r before last <"$memory/failures" || true
    if [[ ${{before:-}} =~ ^[0-9]{{1,9}}$ && ${{last:-}} == "${{newest##*/}}" ]]; then
      failures=$((10#$before + 1))
    fi
  fi
  echo "$failures ${{newest##*/}}" >"$memory/failures"
  if ((failures > {max_failures})); then
    echo "$failures failures in a row without a new checkpoint: not queued again"
    exit 1
  fi
fi
if ((${{SLURM_RESTART_COUNT:-0}} >= {max_requeues})); then
  echo "queued again {max_requeues} times already: not once more"
  exit 1
fi
scontrol requeue "{this}"
# SLURM ends this shell when it has done so.
sleep 120
exit 1
"""


def _default(name: str, quoted: str) -> str:
    """Export a variable that the shell has not set."""
    return f"[[ -v {name} ]] || export {name}={quoted}"
