"""A run that a cluster looks after, for chaos.py and fault_figures.py. As a script: `dsv3` with bad batches."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SOURCES = Path(__file__).parents[1] / "dsv3_train"
HANG_SECONDS = 8
OVERRIDES = [
    "parallel.gpus_per_node=2",  # as on two nodes: resumes share their reading
    "training.sequence_length=32",
    "training.eval_interval=0",
    "schedule.batch_size=8",
    "checkpoint.interval=5",
    "checkpoint.keep_last=2",
    "logging.expert_load_interval=0",
    "logging.tensorboard=false",
    "data.prepare.vocab_size=512",
    f"data.prepare.inputs=[{SOURCES}]",
    "data.workers=1",
    f"faults.hang_seconds={HANG_SECONDS}",
    "faults.max_restarts=20",
    "faults.max_rollbacks=100",
    "faults.spike=20",
    "faults.spike_batches=2",
    "runtime.deterministic=true",
]


@dataclass
class Job:
    """A run and whoever starts it again."""

    directory: Path
    overrides: list[str]
    inject: dict[str, list[int]] = field(default_factory=dict)
    starts: int = 0
    codes: list[int] = field(default_factory=list)
    process: subprocess.Popen | None = None
    finished: bool = False
    broken: str = ""

    @property
    def run_dir(self) -> Path:
        return self.directory / "runs" / "smoke_parallel"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def drive(self) -> None:
        """What a cluster does: start, and start again."""
        while not self.finished and not self.broken:
            arguments = ["train", "smoke_parallel", *self.overrides]
            self.starts += 1
            with (self.directory / "output.txt").open("a") as output:
                self.process = subprocess.Popen(
                    [sys.executable, __file__, json.dumps(self.inject), *arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=self.directory,
                )
                code = self.process.wait()
            self.codes.append(code)
            self.finished = self.finished or code == 0
            if code in (1, 2):
                self.broken = f"ended with exit code {code}: see {self.directory / 'output.txt'}"

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, as their heartbeat files name them."""
        from dsv3_train.runtime import heartbeat

        try:
            children = {child.pid: child for child in psutil.Process(self.process.pid).children()}
        except (psutil.NoSuchProcess, AttributeError):
            return []
        beats = [heartbeat.read(self.run_dir / "heartbeats" / str(rank)) for rank in range(4)]
        return [children[beat.process] for beat in beats if beat and beat.process in children]

    def steps(self) -> tuple[int, float]:
        """The last step in metrics.jsonl, and when the file last grew."""
        path = self.run_dir / "metrics.jsonl"
        try:
            lines = path.read_bytes().splitlines()
            return json.loads(lines[-1])["step"], path.stat().st_mtime
        except (OSError, IndexError, ValueError):
            return 0, 0.0

    def stepped_since(self, moment: float) -> bool:
        return self.steps()[1] > moment and len(self.ranks()) == 4

    def incidents(self) -> int:
        try:
            return len((self.run_dir / "incidents.jsonl").read_bytes().splitlines())
        except OSError:
            return 0

    def last_incident(self) -> dict:
        return json.loads((self.run_dir / "incidents.jsonl").read_text().splitlines()[-1])

    def wait(self, condition, seconds: float) -> bool:
        deadline = time.time() + seconds
        while time.time() < deadline and not self.finished and not self.broken:
            if condition():
                return True
            time.sleep(0.02)
        return False


def child(inject: dict[str, list[int]], arguments: list[str]) -> None:
    """`dsv3` with bad batches at given steps."""
    import dataclasses

    from dsv3_cli.main import run as dsv3

    sys.argv = ["dsv3", *arguments]
    if any(inject.values()):
        import torch

        from dsv3_train.runtime import distributed, heartbeat

        distributed.prepare_import("cpu")
        from dsv3_train.training import run

        plain = run.forward_backward

        def with_faults(trainer, *rest):
            losses, step = plain(trainer, *rest), heartbeat._mine.step
            if step in inject["NaN loss"]:
                losses = dataclasses.replace(losses, loss=math.nan)
            if step in inject["NaN gradient on one rank"] and torch.distributed.get_rank() == step % 4:
                trainer.chunks[0].buffers[0].grad_data[step] = math.nan
            if step in inject["loss spike"]:
                losses = dataclasses.replace(losses, loss=losses.loss + 200)  # also where losses still fall fast
            return losses

        run.forward_backward = with_faults
    dsv3()


if __name__ == "__main__":
    child(json.loads(sys.argv[1]), sys.argv[2:])
