"""The batch script: what it says for 256 nodes, and what it does with stand-ins for srun and scontrol.

tools/slurm_here.py takes it through a real SLURM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_train.errors import UserError
from dsv3_train.runtime import cluster
from dsv3_train.runtime.slurm_jobs import cancel, output, prepare, status

SMOKE = ["parallel.gpus_per_node=2"]


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch) -> Path:
    """A site without defaults, a directory of its own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "cluster.yaml"
    file.write_text("{}")
    monkeypatch.setenv("DSV3_CLUSTER", str(file))
    return file


def prepared(*overrides: str, sweep: tuple = (), **given):
    return prepare("smoke_parallel", [*SMOKE, *overrides], list(sweep), given)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_256_nodes(tmp_path, site):
    """Line by line what a cluster needs (facts about the field: one task per GPU, TERM to ranks, requeue)."""
    site.write_text("{account: lab, partition: gpu, time: 7-00:00:00, modules: [cuda/12.9], environment: {A: 'x y$'}}")
    given = {"container": "image.sqsh", "time": "24:00:00"}
    script = prepare("dsv3_671b_2048xh800", [], [], given, after="7").script
    assert directives(script) == [
        "--job-name=dsv3_671b_2048xh800",
        "--nodes=256",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--exclusive",
        "--partition=gpu",
        "--account=lab",
        "--time=24:00:00",
        f"--chdir={tmp_path}",
        f"--output={tmp_path}/runs/dsv3_671b_2048xh800/slurm/%j.out",
        "--open-mode=append",
        "--signal=TERM@300",
        "--requeue",
        "--dependency=afterany:7",
    ]
    for part in (
        "srun --ntasks=2048 ",
        "--ntasks-per-node=8 ",
        "--kill-on-bad-exit=1 ",
        "--wait=60 ",
        "--container-image=image.sqsh ",
        'scontrol show hostnames "$SLURM_JOB_NODELIST"',
        "20000 + SLURM_JOB_ID % 12000",
        "[[ -v CUDA_DEVICE_MAX_CONNECTIONS ]] || export CUDA_DEVICE_MAX_CONNECTIONS=32",  # pairs overlap in this recipe
        "[[ -v TORCH_FR_BUFFER_SIZE ]] || export TORCH_FR_BUFFER_SIZE=2000",
        "[[ -v NVTE_FWD_LAYERNORM_SM_MARGIN ]] || export NVTE_FWD_LAYERNORM_SM_MARGIN=20",
        '[[ -v TRITON_CACHE_DIR ]] || export TRITON_CACHE_DIR="/tmp/triton-$SLURM_JOB_ID-$DSV3_MEETING"',
        "[[ -v A ]] || export A='x y$'",
        "module load cuda/12.9",
        "torchrun",
    ):
        assert (part in script) == (part != "torchrun"), part


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
def test_shellcheck(tmp_path, site):
    site.write_text(
        "{modules: [a], setup: ['source /x/activate'], environment: {B: 'it''s \"so\"'}, mounts: ['/a:/b']}"
    )
    for number, job in enumerate((
        prepared(container="i"),
        prepared(sweep=("schedule.lr=1e-3,2e-3",)),
        prepare("dsv3_671b_2048xh800", [], [], {}),
    )):  # fmt: skip
        (tmp_path / f"{number}.sh").write_text(job.script)
        done = subprocess.run([SHELLCHECK, "--exclude=SC1091", f"{number}.sh"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_is_refused(site):
    with pytest.raises(UserError, match=r"--nodes: 3 nodes of 2 .*world_size=4 takes 2; set parallel\.world_size=6"):
        prepare("smoke_parallel", SMOKE, [], {}, asked_nodes=3)
    with pytest.raises(UserError, match=r"parallel\.world_size: 4 processes do not fill nodes of 3 .*3 or 6"):
        prepare("smoke_parallel", ["parallel.gpus_per_node=3"], [], {})
    with pytest.raises(UserError, match=r"parallel\.expert"):
        prepared("parallel.expert=3")  # at submission, not after an hour in the queue
    with pytest.raises(UserError, match=r"--sweep: 'schedule\.lr'"):
        prepared(sweep=("schedule.lr",))
    with pytest.raises(UserError, match=r"parallel\.context: context parallelism cannot run yet"):
        prepare("dsv3_16b", ["parallel.context=2", "parallel.world_size=16"], [], {})
    pieces = "[{linear: [0, 1e-3], until: 100 steps}, {constant: 1e-3, until: 1024}, {constant: 1e-4}]"
    with pytest.raises(UserError, match=r"schedule\.lr\.1\.until"):  # which only the batch schedule can tell
        prepared(f"schedule.lr={pieces}", "training.duration=200 steps")
    with pytest.raises(UserError, match="duraton"):
        prepared(sweep=("training.duraton=1,2",))
    with pytest.raises(UserError, match=r"^--time: '24h': give MINUTES, HOURS:MINUTES:SECONDS"):
        prepare("dsv3_16b", [], [], {"time": "24h"})
    site.write_text("{time: '5:00'}")
    with pytest.raises(UserError, match=r"cluster\.yaml: time: 5:00: a job is told to save 300 s before"):
        prepare("dsv3_16b", [], [], {})
    prepare("dsv3_16b", [], [], {"time": "5:01"})
    site.write_text("{partitoin: x}")
    with pytest.raises(UserError, match=r"cluster\.yaml: partitoin: unknown key; there are partition"):
        cluster.load()
    site.write_text("{modules: x}")
    with pytest.raises(UserError, match=r"cluster\.yaml: modules"):
        cluster.load()
    site.write_text("{a: [")
    with pytest.raises(UserError, match=r"cluster\.yaml: no YAML"):
        cluster.load()
    forms = {"30": 30, "30:15": 30.25, "24:00:00": 1440, "1-0": 1440, "1-2:3": 1563, "7-00:00:00": 10080}
    assert {text: cluster.seconds(text) / 60 for text in forms} == forms
    assert cluster.seconds("UNLIMITED") == float("inf")
    with pytest.raises(UserError, match="no run that was submitted"):
        status("nothing")


def test_sweep():
    job = prepared(sweep=("schedule.lr=1e-3,2e-3", "training.seed=1,2"))
    assert [path.name for path in job.job.run_dirs] == [f"smoke_parallel-{number}" for number in range(4)]
    assert [(recipe.schedule.lr[0].constant, recipe.training.seed) for recipe in job.job.recipes] == [
        (1e-3, 1),
        (1e-3, 2),
        (2e-3, 1),
        (2e-3, 2),
    ]
    assert "--array=0-3" in directives(job.script)


@pytest.mark.parametrize(
    ("overrides", "swept", "differs"),
    [
        (["precision.fp8=blockwise"], "precision.power_of_2_scales=false,true", r"NVTE_\w+FP32_SCALES is 1 .* not set"),
        (["training.micro_batch_size=1"], "parallel.world_size=1,2", r"parallel\.world_size is 1 in run 0 and 2"),
        ([], "parallel.gpus_per_node=4,4,8", r"parallel\.gpus_per_node is 4 in run 0 and 8 in run 2"),
        ([], "runtime.device=cpu,auto", r"runtime\.device is cpu in run 0 and auto or cuda in run 1"),
        ([], "runtime.run_dir=a/x,b/x", r"folder of runtime\.run_dir is a in run 0 and b in run 1"),
        ([], "faults.max_restarts=1,2", r"faults\.max_restarts is 1 in run 0 and 2 in run 1"),
        ([], "faults.stop_lead_seconds=60,90", r"faults\.stop_lead_seconds is 60 in run 0 and 90 in run 1"),
    ],
)
def test_runs_of_a_sweep_that_need_scripts_of_their_own(overrides, swept, differs):
    """An array has one script: the first run's environment and processes would be everyone's."""
    with pytest.raises(UserError, match=rf"^--sweep {swept}: .*{differs}.*; submit these apart$"):
        prepare("dsv3_tiny", overrides, [swept], {})


def test_sweep_of_precision_without_gpus():
    """There the script sets nothing that depends on it."""
    recipes = prepared(sweep=("precision.power_of_2_scales=false,true",)).job.recipes
    assert [recipe.precision.power_of_2_scales for recipe in recipes] == [False, True]


SQUEUE = r"""
for argument; do
  case $argument in
  --jobs=*) job=${argument#*=} job=${job##*,} ;;
  --Format=*) columns=$(echo "${argument#*=}" | tr , " ") ;;
  --format=*) echo "41 RUNNING restarts=n[7-8]" ;; # what %R is
  esac
done
for column in $columns; do
  case $column in
  JobArrayID:*) word=$job ;;
  State:*) word=RUNNING ;;
  RestartCnt:*) word=2 ;;
  ReasonList:*) word="n[7-8]" ;;
  esac
  printf "%-${column#*:}s" "$word"
done
echo
"""
STAND_INS = {
    "sbatch": 'echo "$@" >>"$CALLS"; echo 4$(wc -l <"$CALLS")',
    "scontrol": 'case "$2" in hostnames) printf "n7\\nn8\\n" ;; job) echo "$JOB" ;; *) echo "$@" >>"$CALLS" ;; esac',
    "sleep": "exit 0",  # until SLURM has ended the script
    "scancel": 'echo "scancel $*" >>"$CALLS"',
    "squeue": '[ -n "$EMPTY" ] && exit\n' + SQUEUE,
    "srun": 'echo "srun at $MASTER_ADDR:$MASTER_PORT" >>"$CALLS"; [ -z "$STATE" ] || echo "$STATE" >"$RUN_DIR/state";'
    ' [ -z "$NEWEST" ] || mkdir -p "$RUN_DIR/checkpoints/$NEWEST"; exit "$CODE"',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Programs that write down how they were called; the file in which they do."""
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("CALLS", str(calls))
    return calls


def test_what_becomes_of_a_job(slurm, tmp_path):
    """Preempted: back into the queue. Failed: as often as the recipe says without a new checkpoint. Refused: never."""
    job = prepared("faults.max_restarts=2", "checkpoint.interval=5")
    job.submit()
    run_dir = tmp_path / "runs" / "smoke_parallel"
    assert json.loads(json.dumps(status(str(run_dir)).__dict__))["queue"] == "41 RUNNING restarts=2 n[7-8]"

    def start(code: int, state: str = "", newest: str = "", restarts: int = 0, job: str = "") -> tuple[int, bool]:
        """One start of the script; its exit code, and whether it went back into the queue."""
        slurm.write_text("")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MASTER_")},
            "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_RESTART_COUNT": str(restarts),
            "RUN_DIR": str(run_dir), "CODE": str(code), "STATE": state, "NEWEST": newest, "JOB": job,
        }  # fmt: skip
        done = subprocess.run(["bash", str(run_dir / "slurm" / "script.sh")], env=environment, capture_output=True)
        calls = slurm.read_text().splitlines()
        assert calls[:1] in ([], ["srun at n7:20041"])
        return done.returncode, "requeue 41" in calls

    assert start(143, "preempted", "step_00000005")[1]
    assert start(75, "running")[1]  # asked to stop before the first step
    # As SLURM 22.05 shows them: by a job that goes before, at its time, by scancel.
    assert start(75, "preempted", job="JobId=41 JobState=RUNNING Reason=None PreemptTime=2026-11-27T07:52:10 X=")[1]
    assert start(75, "preempted", job="JobId=41 JobState=COMPLETING Reason=TimeLimit PreemptTime=None X=")[1]
    ended = "JobId=41 JobState=COMPLETING Reason=None PreemptTime=None X="
    assert start(75, "preempted", job=ended) == (1, False)
    for _ in range(2):
        assert start(1, "failed")[1]
    assert start(1, "failed") == (1, False)  # the third in a row at the same checkpoint
    assert start(1, "failed", "step_00000010")[1]  # there is a new one: counted from the start
    assert start(137)[1]  # a node died: nobody left a word
    assert start(2, "refused") == (2, False)
    assert start(143, "preempted", restarts=100) == (1, False)
    assert start(0, "finished", "step_00000015") == (0, False)
    assert start(1) == (0, False)  # finished before: the next of a chain has nothing to do
    assert slurm.read_text() == ""


def test_chain_status_logs_cancel(slurm, tmp_path, monkeypatch):
    job = prepared()
    assert job.submit(chain=3) == ["41", "42", "43"]
    script = tmp_path / "runs" / "smoke_parallel" / "slurm" / "script.sh"
    assert slurm.read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --dependency=afterany:41 {script}",
        f"--parsable --dependency=afterany:42 {script}",
    ]
    run = str(tmp_path / "runs" / "smoke_parallel")
    with pytest.raises(UserError, match="no output yet"):
        output(run)
    (Path(run) / "slurm" / "41.out").write_text("words\n")
    assert output(run).read_text() == "words\n"
    with pytest.raises(UserError, match=r"smoke_parallel: has a job in the queue \(43 RUNNING .*dsv3 slurm cancel"):
        job.submit()
    assert cancel(run) == ["41", "42", "43"]
    assert "scancel 41 42 43" in slurm.read_text()
    assert sorted(path.name for path in (Path(run) / "slurm").glob("cancelled.*")) == [
        f"cancelled.{job}" for job in (41, 42, 43)
    ]
    monkeypatch.setenv("EMPTY", "1")
    assert job.submit() == ["45"]
    assert status(run).state == "none"


def test_one_run_of_a_sweep(slurm, tmp_path):
    """Its status, output and end are its own, not the array's."""
    assert prepared("runtime.run_dir=runs/sw", sweep=("training.seed=1,2",)).submit(chain=2) == ["41", "42"]
    for number in range(2):
        (tmp_path / "runs" / f"sweep-41_{number}.out").write_text(f"words of {number}\n")
    os.utime(tmp_path / "runs" / "sweep-41_0.out", (1, 1))  # the other's is newer
    assert output("runs/sw-0").read_text() == "words of 0\n"
    assert output("runs/sw-1").read_text() == "words of 1\n"
    assert status("runs/sw-1").queue == "42_1 RUNNING restarts=2 n[7-8]"
    assert cancel("runs/sw-0") == ["41_0", "42_0"]
    assert slurm.read_text().splitlines()[-1] == "scancel 41_0 42_0"
    assert [Path(f"runs/sw-{number}/slurm/cancelled.41_{number}").exists() for number in range(2)] == [True, False]


def test_one_run_of_a_sweep_is_queued_again(slurm, tmp_path):
    """The last task of an array has its number: `scontrol requeue 41` would end and queue the others as well."""
    prepared("runtime.run_dir=runs/sw", sweep=("training.seed=1,2",)).submit()
    slurm.write_text("")
    environment = {
        **os.environ, "SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_NODELIST": "n[7-8]", "RUN_DIR": "runs/sw-1", "CODE": "143", "STATE": "preempted", "NEWEST": "",
    }  # fmt: skip
    subprocess.run(["bash", "runs/sw-1/slurm/script.sh"], env=environment, capture_output=True)
    assert slurm.read_text().splitlines()[1:] == ["requeue 41_1"]


def test_dry_run_touches_nothing(tmp_path):
    command = [sys.executable, "-m", "dsv3_cli.main", "slurm", "submit", "smoke_parallel", *SMOKE]
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True)
    shown = json.loads(done.stdout)
    assert "srun --ntasks=4" in shown["script"]
    assert "name: smoke_parallel" in shown["recipes"][0]
    assert sorted(tmp_path.iterdir()) == before
    differ = [*command, "--sweep", "faults.max_restarts=1,2", "--dry-run"]
    done = subprocess.run(differ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = subprocess.run([*command, "--out", "job.sh"], capture_output=True, text=True)
    assert (done.returncode, Path("job.sh").read_text()) == (0, shown["script"])
    assert "name: smoke_parallel" in Path("runs/smoke_parallel/slurm/recipe.yaml").read_text()
