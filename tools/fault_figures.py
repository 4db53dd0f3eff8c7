"""What surviving costs: from a kill to the next step, a checkpoint's standstill, the watchdog. CPU figures.

    tools/fault_figures.py            # about 5 minutes on two quiet cores; --json for one object

`smoke_parallel` on 4 processes (checkpoint 29 MB). Times are the least and the median of several.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from chaos_run import OVERRIDES, Job


def times(values: list[float]) -> dict[str, float]:
    return {"least": round(min(values), 3), "median": round(median(values), 3), "of": len(values)}


def job(where: Path, name: str, *overrides: str) -> Job:
    made = Job(where / name, [*OVERRIDES, f"data.prepare.output={where / 'data'}", *overrides])
    made.directory.mkdir()
    return made


def trained(where: Path, name: str, *overrides: str) -> tuple[list[float], list[float]]:
    """Step times of a run after its first steps, and each checkpoint's standstill."""
    run = job(where, name, *overrides)
    run.drive()
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    still = re.findall(r"stood still for ([0-9.]+) s", (run.run_dir / "log.txt").read_text())
    return [line["step_seconds"] for line in lines[5:]], [float(seconds) for seconds in still]


def kills(where: Path, count: int) -> list[float]:
    """Seconds from SIGKILL of a rank until metrics.jsonl has a line of a new step."""
    run = job(where, "kills", "training.duration=100000 steps", "faults.hang_seconds=60")
    driver = threading.Thread(target=run.drive, daemon=True)
    driver.start()
    found = []
    for _ in range(count):
        if not run.wait(lambda: run.steps()[0] > 5 and len(run.ranks()) == 4, 300):
            sys.exit(f"the run does not train: {run.broken or run.directory}")
        time.sleep(2)
        ranks = run.ranks()
        if len(ranks) < 4:  # a machine so busy that the watchdog ended the run
            continue
        ranks[1].send_signal(signal.SIGKILL)
        moment = time.time()
        time.sleep(0.2)  # a step that was being logged
        run.wait(lambda moment=moment: run.steps()[1] > moment + 0.2, 120)
        found.append(time.time() - moment)
        print(f"a new step {found[-1]:.1f} s after a kill", file=sys.stderr, flush=True)
    run.finished = True
    run.process.kill()
    driver.join()
    return found


def heartbeat_costs() -> dict[str, float]:
    """Microseconds of a mark (main thread, some dozen a step) and of a beat (own thread, one every 0.1 to 5 s)."""
    from dsv3_train.runtime.heartbeat import Heartbeat

    with tempfile.TemporaryDirectory() as directory:
        beat = Heartbeat(Path(directory), 0)

        def least(work, number: int) -> float:
            best = float("inf")
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(number):
                    work()
                best = min(best, (time.perf_counter() - start) / number)
            return round(best * 1e6, 2)

        return {
            "mark": least(lambda: beat.mark("forward of a micro-batch"), 20000),
            "beat": least(lambda: beat.beat(True, "all_reduce (distributed/distributed_c10d.py:3000)"), 200),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    where = Path(tempfile.mkdtemp(prefix="fault-figures-"))
    short = ["training.duration=80 steps", "checkpoint.interval=10"]
    on, still_async = trained(where, "watchdog-async", *short, "checkpoint.asynchronous=true")
    _, still_sync = trained(where, "sync", *short, "checkpoint.asynchronous=false")
    off, _ = trained(
        where, "no-watchdog", "training.duration=80 steps", "checkpoint.interval=0", "faults.hang_seconds=0"
    )
    with_watchdog, _ = trained(where, "watchdog", "training.duration=80 steps", "checkpoint.interval=0")
    report = {
        "kill_to_new_step_seconds": times(kills(where, 6)),
        "checkpoint_standstill_seconds": {"asynchronous": times(still_async), "synchronous": times(still_sync)},
        "step_seconds": {"watchdog": times(with_watchdog), "no watchdog": times(off), "checkpoints": times(on)},
        "heartbeat_microseconds": heartbeat_costs(),
    }
    shutil.rmtree(where)
    print(json.dumps(report) if options.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
