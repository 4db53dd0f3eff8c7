"""A real SLURM with two virtual nodes on this machine, and a run that is preempted there.

    tools/slurm_here.py

Needs Debian's slurm-wlm and munge, and root. Submits `smoke_parallel` (two nodes, two tasks each) with `dsv3 slurm
submit` to a partition that a higher one preempts; a job in the higher one makes SLURM send TERM; the run saves, goes
back into the queue, goes on when the other job is done, and ends. Says at each stage what it waits for; exit code 0 if
all of that happened, 3 if SLURM cannot start here, with the reason.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={where}/state
SlurmdSpoolDir={where}/spool-%n
SlurmctldPidFile={where}/slurmctld.pid
SlurmdPidFile={where}/slurmd-%n.pid
SlurmctldLogFile={where}/slurmctld.log
SlurmdLogFile={where}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPort=16817
SwitchType=switch/none
MpiDefault=none
SlurmctldParameters=enable_configless
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17000-17001] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=n[0-1] Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=high Nodes=n[0-1] MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""
STEPS = 60
OVERRIDES = [
    "parallel.gpus_per_node=2",
    f"training.duration={STEPS} steps",
    "training.eval_interval=0",
    "training.sequence_length=32",
    "schedule.batch_size=8",
    "checkpoint.interval=10",
    "logging.tensorboard=false",
    "logging.expert_load_interval=0",
    "data.prepare.vocab_size=512",
    f"data.prepare.inputs=[{Path(__file__).parents[1] / 'dsv3_train' / 'recipe'}]",
    "data.workers=1",
]


class NotHere(Exception):
    """SLURM cannot run on this machine."""


class Slurm:
    """The daemons, ended by `stop`."""

    def __init__(self, where: Path) -> None:
        self._where, self._daemons = where, []

    def start(self) -> None:
        needed = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
        missing = [name for name in needed if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
        if missing:
            raise NotHere(f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge")
        if os.geteuid():
            raise NotHere("the daemons need root")
        if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
            for folder in ("/run/munge", "/var/log/munge"):
                Path(folder).mkdir(exist_ok=True)
                shutil.chown(folder, "munge", "munge")
            self._start("munged", "runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground")
        for folder in ("state", "spool-n0", "spool-n1"):
            (self._where / folder).mkdir()
        config = self._where / "slurm.conf"
        config.write_text(CONF.format(host=platform.node(), where=self._where))
        os.environ["SLURM_CONF"] = str(config)
        site = self._where / "cluster.yaml"  # n0 and n1 are names that only SLURM knows
        site.write_text("environment: {MASTER_ADDR: 127.0.0.1}\n")
        os.environ["DSV3_CLUSTER"] = str(site)
        self._start("slurmctld", "/usr/sbin/slurmctld", "-D", "-f", str(config))
        for node in ("n0", "n1"):
            self._start("slurmd", "/usr/sbin/slurmd", "-D", "-f", str(config), "-N", node)
        deadline = time.time() + 60
        while told("sinfo", "--noheader", "--format=%T %D", "--partition=low").split() != ["idle", "2"]:
            if time.time() > deadline:
                logs = [file.read_text()[-600:] for file in self._where.glob("*.log")]
                raise NotHere("two idle nodes did not come up within 60 s\n" + "\n".join(logs))
            time.sleep(1)

    def _start(self, name: str, *command: str) -> None:
        log = (self._where / f"{name}-{len(self._daemons)}.log").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._daemons.append(process)
        time.sleep(1)
        if process.poll() is not None:
            raise NotHere(f"{name} ended at once: {Path(log.name).read_text()[-600:]}")

    def stop(self) -> None:
        if "SLURM_CONF" in os.environ:  # its processes would outlive the daemons
            for job in told("squeue", "--noheader", "--format=%i").split():
                told("scancel", "--full", "--signal=KILL", job)
                told("scancel", job)
            deadline = time.time() + 60
            while told("squeue", "--noheader") and time.time() < deadline:
                time.sleep(0.5)
        for process in reversed(self._daemons):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def told(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.stdout.strip()


class Failed(Exception):
    """Something that had to happen did not."""


def wait(what: str, condition, seconds: float, began: float) -> None:
    print(f"{time.time() - began:5.0f} s  waiting for: {what}", flush=True)
    deadline = time.time() + seconds
    while not condition():
        if "not queued again" in "".join(file.read_text() for file in Path("runs").rglob("*.out")):
            raise Failed(f"the job gave up before: {what}")
        if time.time() > deadline:
            raise Failed(f"not within {seconds:g} s: {what}\n{told('squeue')}")
        time.sleep(0.5)


def run(where: Path) -> None:
    began = time.time()
    dsv3 = [sys.executable, "-m", "dsv3_cli.main"]
    os.chdir(where)
    submitted = told(*dsv3, "slurm", "submit", "smoke_parallel", *OVERRIDES, "--partition", "low", "--json")
    job = json.loads(submitted)["jobs"][0]
    run_dir = where / "runs" / "smoke_parallel"

    def status() -> dict:
        return json.loads(told(*dsv3, "slurm", "status", str(run_dir), "--json") or "{}")

    wait("the first steps", lambda: status().get("step", 0) >= 12, 240, began)
    told("sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=high.out", "--wrap=sleep 15")
    print(f"{time.time() - began:5.0f} s  a job in the higher partition: {told('squeue', '--format=%i %P %T %r')}")
    wait("the run to save and end", lambda: "asked to stop" in (run_dir / "log.txt").read_text(), 120, began)
    restarts = f"scontrol show job {job} | grep -o 'Restarts=[0-9]*'"
    wait("job to go back into the queue", lambda: "Restarts=1" in told("bash", "-c", restarts), 120, began)
    resumed = "resumed from"
    wait("the run to go on", lambda: resumed in (run_dir / "log.txt").read_text(), 400, began)
    wait("the run to end", lambda: (run_dir / "slurm" / "finished").exists(), 400, began)
    wait("job to leave the queue", lambda: job not in told("squeue", "--noheader", "--format=%i"), 60, began)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "step"]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"steps {steps}")
    text = (run_dir / "log.txt").read_text().splitlines()
    print("\n".join(line for line in text if any(word in line for word in ("asked", resumed, "done"))))
    print(told("bash", "-c", f"scontrol show job {job} | grep -E 'JobState|Restarts'"))
    print(f"{time.time() - began:5.0f} s  submitted, preempted, queued again, resumed, ended: each step once")


def main() -> None:
    where = Path(tempfile.mkdtemp(prefix="slurm-here-"))
    slurm = Slurm(where)
    try:
        slurm.start()
        run(where)
    except NotHere as reason:
        print(f"SLURM cannot run here: {reason}", file=sys.stderr)
        sys.exit(3)
    except Failed as reason:
        print(reason, file=sys.stderr)
        for file in sorted((where / "runs").rglob("*.out")):
            print(f"--- {file}\n{file.read_text()[-3000:]}", file=sys.stderr)
        sys.exit(1)
    finally:
        slurm.stop()
    shutil.rmtree(where)


if __name__ == "__main__":
    main()
