"""A checkpoint that goes from one layout to another on the GPUs of one host, and a rank that is killed there.

Part of gpu_schedules.py. A smaller `dsv3_tiny` under DualPipe in the first layout, eight steps with a checkpoint after
four; from that in the second layout, where a rank gets a SIGKILL in the middle; both runs' losses of steps 5 to 8 side
by side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LAYOUTS = {8: ((4, 2), (2, 4)), 4: ((4, 1), (2, 2)), 2: ((2, 1), (1, 2))}
"""(pipeline, expert) before and after, by number of GPUs."""


def change_layout(options: argparse.Namespace) -> dict[str, Any]:
    """Losses before and after; seconds from the kill to the first step that had not been done before it."""
    from dsv3_train.runtime import heartbeat

    first, second = (options.work / name for name in ("before", "after"))
    for folder in (first, second):
        shutil.rmtree(folder, ignore_errors=True)
    before, after = LAYOUTS[options.gpus]
    wait(train(options, first, before, ["checkpoint.interval=4"]), options)
    begin = first / "checkpoints" / "step_00000004"
    run = train(options, second, after, ["checkpoint.interval=1", f"checkpoint.load={begin}"])
    until(run, options, lambda: 6 in losses(second) and (second / "checkpoints" / "step_00000005").is_dir())
    ranks = [heartbeat.read(second / "heartbeats" / str(rank)) for rank in range(options.gpus)]
    children = {child.pid for child in psutil.Process(run.pid).children()} if run.poll() is None else set()
    victims = [beat.process for beat in ranks if beat and beat.process in children]
    if not victims:
        raise SystemExit(f"{second}: over before a rank could be killed; see {second}.log")
    os.kill(victims[0], signal.SIGKILL)
    killed, reached = time.monotonic(), max(losses(second))
    until(run, options, lambda: max(losses(second), default=0) > reached)
    seconds = time.monotonic() - killed
    wait(run, options)
    incidents = [json.loads(line)["text"] for line in (second / "incidents.jsonl").read_text().splitlines()]
    return {
        "before": {"pipeline, expert": before, "losses": losses(first)},
        "after": {"pipeline, expert": after, "losses": losses(second), "incidents": incidents},
        "seconds_from_kill_to_new_step": seconds,
    }


def train(options: argparse.Namespace, run_dir: Path, layout: tuple[int, int], more: list[str]) -> subprocess.Popen:
    pipeline, expert = layout
    schedule = "dualpipe" if pipeline > 1 else "1f1b"
    recipe = "smoke" if options.cpu else "dsv3_tiny"
    overrides = [
        f"parallel={{world_size: {options.gpus}, pipeline: {pipeline}, expert: {expert}, zero1: true}}",
        f"parallel.gpus_per_node={options.gpus // 2}",  # as on two nodes: resumes share their reading
        f"pipeline={{schedule: {schedule}}}",
        "training.duration=8 steps",
        "training.eval_interval=0",
        "schedule.batch_size=16",
        "training.micro_batch_size=1",  # several micro-batches for each pipeline of any layout
        "faults.hang_seconds=120",
        # 0.1B parameters: every step of the second run waits for the disk.
        *([] if options.cpu else ["model.n_routed_experts=8", "model.vocab_size=8192", "data.prepare.vocab_size=8192"]),
        f"runtime.run_dir={run_dir}",
        f"data.prepare.output={options.work / 'data' / recipe}",
    ]
    with (options.work / f"{run_dir.name}.log").open("ab") as log:
        command = [sys.executable, "-m", "dsv3_cli.main", "train", recipe, *overrides, *more]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def until(run: subprocess.Popen, options: argparse.Namespace, condition: Callable[[], bool]) -> None:
    """Go on when something is so, or the run is over, or the time."""
    while not condition() and run.poll() is None and time.monotonic() < options.deadline:
        time.sleep(0.05)


def wait(run: subprocess.Popen, options: argparse.Namespace) -> None:
    try:
        run.wait(max(1.0, options.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.kill()  # its ranks die with it
        raise SystemExit("a checkpoint in another layout: out of time; see --minutes") from None
    if run.returncode:
        raise SystemExit(f"exit code {run.returncode}: see the logs in {options.work}")


def losses(run_dir: Path) -> dict[int, float]:
    """By step; empty before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
