"""A run under faults: killed, stopped, preempted, its checkpoints damaged, its disk full, its numbers wrong.

    tools/chaos.py --faults 50 --seed 1 --json

Trains `smoke_parallel` (4 CPU processes, pipeline 2 x expert 2, ZeRO-1) twice under faults at random moments: once with
faults that must not change anything, compared with an undisturbed run; once with bad batches among them, compared with
a run that is told to skip the same samples. Equal means: the loss of every step, and the last checkpoint, bit for bit.
Nothing helps a run along but what a cluster does: it is started again when it ended for a reason other than bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
from chaos_run import HANG_SECONDS, OVERRIDES, Job

STEPS_PER_FAULT = 10
HARMLESS = (
    "kill one rank",
    "kill all ranks",
    "kill the launcher",
    "TERM",
    "USR1",
    "stop and continue",
    "stop for good",
    "kill during checkpoint write",
    "damaged newest checkpoint",
    "full disk",
)
DATA = ("NaN loss", "NaN gradient on one rank", "loss spike")


@dataclass
class Fault:
    """One fault and what became of it."""

    kind: str
    step: int
    at_seconds: float
    outcome: str = ""
    survived: bool = False
    seconds_to_step: float | None = None
    """Until a step was done after it."""


def inflict(job: Job, fault: Fault, draw: random.Random) -> None:
    """Do it, at once; a word on what was hit goes into the outcome."""

    def send(number: int, *processes: psutil.Process) -> None:
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    job.wait(job.ranks, 30)  # it may just be starting
    ranks = job.ranks()
    one = draw.choice(ranks) if ranks else None
    launcher = psutil.Process(job.process.pid)
    match fault.kind:
        case "kill one rank":
            send(signal.SIGKILL, *([one] if one else []))
        case "kill all ranks":
            send(signal.SIGKILL, *ranks)
        case "kill the launcher":
            send(signal.SIGKILL, launcher)
        case "TERM" | "USR1":
            send(signal.SIGTERM if fault.kind == "TERM" else signal.SIGUSR1, launcher)
        case "stop and continue":
            send(signal.SIGSTOP, *([one] if one else []))
            time.sleep(draw.uniform(0.5, HANG_SECONDS / 3))
            send(signal.SIGCONT, *([one] if one else []))
        case "stop for good":
            send(signal.SIGSTOP, *([one] if one else []))
        case "kill during checkpoint write":
            if job.wait(lambda: list(job.checkpoints.glob("*.unfinished/*")), 30):
                fault.outcome = next(job.checkpoints.glob("*.unfinished"), Path("just complete")).name + "; "
            send(signal.SIGKILL, *(job.ranks() if draw.random() < 0.5 else job.ranks()[:1]))
        case "damaged newest checkpoint":
            whole = sorted(path for path in job.checkpoints.glob("step_*") if "." not in path.name)
            if len(whole) > 1:
                try:
                    file = draw.choice(sorted(whole[-1].iterdir()))
                    data = bytearray(file.read_bytes())
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                    file.write_bytes(data)
                    fault.outcome = f"one bit of {whole[-1].name}/{file.name}; "
                except OSError:
                    pass  # it was just being pruned
            send(signal.SIGKILL, *ranks)
        case "full disk":
            seen = job.incidents()
            filler = job.checkpoints / "filler"
            with filler.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 20))
                        file.flush()
                except OSError:
                    pass
            job.wait(lambda: job.incidents() > seen, 60)
            filler.unlink()
            if job.incidents() > seen:
                fault.outcome = job.last_incident()["text"][-90:] + "; "


def harass(job: Job, kinds: list[str], draw: random.Random, deadline: float) -> list[Fault]:
    """Inflict faults one after the other while the run goes on; each must be followed by a new step."""
    began, done = time.time(), []
    for kind in kinds:
        # Most of the time while it trains, now and then while it starts.
        if draw.random() > 0.15 or kind in ("full disk", "damaged newest checkpoint", "USR1", "TERM"):
            job.wait(partial(job.stepped_since, time.time()), 60)
        time.sleep(draw.uniform(0, 1.5))
        if job.finished or job.broken or time.time() > deadline:
            break
        if kind == "kill the launcher" and len(job.ranks()) < 4:
            kind = "kill one rank"
        step, _ = job.steps()
        fault = Fault(kind, step, round(time.time() - began, 1))
        starts, incidents, moment = job.starts, job.incidents(), time.time()
        inflict(job, fault, draw)
        hit = time.time() if kind in ("stop and continue", "full disk", "kill during checkpoint write") else moment
        if kind in ("TERM", "USR1"):  # steps go on until all ranks agree to stop
            job.wait(lambda starts=starts: job.starts > starts, 60)
            hit = time.time()
        fault.survived = job.wait(partial(job.stepped_since, hit + 0.3), 90) or job.finished
        if fault.survived:
            fault.seconds_to_step = round(time.time() - hit, 1)
        restarted = "started again by the cluster" if job.starts > starts else ""
        if not restarted and job.incidents() > incidents and kind not in ("full disk",):
            restarted = f"started again by the launcher ({job.last_incident()['kind']})"
        fault.outcome += restarted or "went on"
        done.append(fault)
        print(f"{len(done):3}  {fault.kind:30} step {fault.step:4}  {fault.outcome}", file=sys.stderr, flush=True)
    return done


def told(job: Job) -> list[str]:
    path = job.run_dir / "skips.jsonl"
    skips = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [f"{skip['first']}-{skip['last']}" for skip in skips]


def equal(a: Job, b: Job) -> dict[str, bool]:
    """Bit for bit: the loss of each step, the last one, and what the last checkpoint holds."""

    def losses(job: Job) -> dict[int, float]:
        lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}

    def checkpoint(job: Job) -> dict:
        newest = max(path for path in job.checkpoints.glob("step_*") if "." not in path.name)
        sums = json.loads((newest / "manifest.json").read_text())["sha256"]
        return {newest.name: {name: value for name, value in sums.items() if name.endswith(".distcp")}}

    left, right = losses(a), losses(b)
    return {
        "final_loss": left[max(left)] == right[max(right)] and max(left) == max(right),
        "all_losses": left == right,
        "checkpoint": checkpoint(a) == checkpoint(b),
    }


def mounted(job: Job) -> bool:
    """Give the run's checkpoints a small disk of their own; false where that is not allowed."""
    job.checkpoints.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(job.checkpoints)], capture_output=True
    )
    return made.returncode == 0


def phase(name: str, where: Path, count: int, with_data: bool, draw: random.Random, deadline: float) -> dict:
    """One run under faults and the one it is compared with."""
    steps = count * STEPS_PER_FAULT + 20
    duration = f"training.duration={steps} steps"
    data = f"data.prepare.output={where / 'data'}"
    job = Job(where / name, [*OVERRIDES, duration, data])
    kinds, faults = [], []
    if with_data:
        each = math.ceil(count / 6)
        at = sorted(draw.sample(range(15, steps - 5, 3), 3 * each))
        draw.shuffle(at)
        job.inject = {kind: at[i * each : (i + 1) * each] for i, kind in enumerate(DATA)}
        count -= 3 * each
    allowed = mounted(job)
    usable = [kind for kind in HARMLESS if kind != "full disk" or allowed]
    while len(kinds) < count:
        kinds += draw.sample(usable, len(usable))
    driver = threading.Thread(target=job.drive, daemon=True)
    try:
        driver.start()
        faults = harass(job, kinds[:count], draw, deadline)
        while driver.is_alive() and not job.broken:
            driver.join(1)
        reference = Job(where / f"{name}-reference", [*job.overrides, f"faults.skip_samples={json.dumps(told(job))}"])
        reference.directory.mkdir()
        if not job.broken:
            reference.drive()
        for kind, at in job.inject.items():
            skips = (job.run_dir / "skips.jsonl").read_text().splitlines()
            found = {json.loads(line)["step"] for line in skips}
            for step in at:
                outcome = "rolled back, samples skipped" if kind == "loss spike" else "samples skipped on all ranks"
                faults.append(Fault(kind, step, 0.0, outcome if step in found else "not found", step in found))
        same = equal(job, reference) if job.finished and reference.finished else {}
    finally:
        if job.process and job.process.poll() is None:
            job.process.kill()
            job.process.wait()
        if allowed:
            subprocess.run(["umount", "-l", str(job.checkpoints)], check=False)
    return {
        "name": name,
        "steps": steps,
        "starts_by_the_cluster": job.starts,
        "exit_codes": dict(Counter(map(str, job.codes))),
        "broken": job.broken,
        "skipped": told(job),
        "equal": same,
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="inflict no more faults after this long")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", type=Path, help="leave the runs here (a new directory)")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    where = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    where.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.time()
    end = began + 60 * options.minutes
    half = options.faults * 3 // 5
    phases = [
        phase("harmless", where, half, False, draw, began + 36 * options.minutes),
        phase("bad-batches", where, options.faults - half, True, draw, end),
    ]
    faults = [fault for part in phases for fault in part["faults"]]
    survived = [fault for fault in faults if fault.survived]
    times = sorted(fault.seconds_to_step for fault in faults if "kill" in fault.kind and fault.seconds_to_step)
    report = {
        "faults": len(faults),
        "survived": len(survived),
        "final_loss_equal": all(part["equal"].get("final_loss", False) for part in phases),
        "all_losses_equal": all(part["equal"].get("all_losses", False) for part in phases),
        "checkpoints_equal": all(part["equal"].get("checkpoint", False) for part in phases),
        "seed": options.seed,
        "minutes": round((time.time() - began) / 60, 1),
        "kill_to_first_step_seconds": {"median": times[len(times) // 2], "worst": times[-1]} if times else None,
        "by_kind": {
            kind: f"{sum(f.survived for f in faults if f.kind == kind)}/{number}"
            for kind, number in Counter(fault.kind for fault in faults).items()
        },
        "phases": [{**part, "faults": [asdict(fault) for fault in part["faults"]]} for part in phases],
    }
    if options.json:
        print(json.dumps(report))
    else:
        for fault in faults:
            print(f"{fault.kind:30} step {fault.step:4}  {fault.seconds_to_step or '':>5}  {fault.outcome}")
        print({key: value for key, value in report.items() if key != "phases"})
    if not options.keep:
        shutil.rmtree(where, ignore_errors=True)
    whole = report["survived"] == report["faults"] and report["final_loss_equal"] and report["all_losses_equal"]
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
