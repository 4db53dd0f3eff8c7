"""Speed of training as the log has it: a recipe in this tree and in others, one after the other on one machine.

    python tools/bench_training.py dsv3_tiny --trees . ../before --steps 90 --from 60 [KEY=VALUE ...]

Each tree is a checkout of this project. Prints medians over the steps from `--from` on, and the losses of both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def steps_of(run: Path) -> list[dict]:
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []
    return [line for line in lines if line["kind"] == "step"]


def train(tree: Path, recipe: str, overrides: list[str], run: Path, steps: int, limit: float) -> list[dict]:
    """The first `steps` steps of a run, which is then ended."""
    with tempfile.TemporaryDirectory() as names:
        for name, folder in (("dsv3_cli", "cli"), ("dsv3_recipes", "recipes")):
            (Path(names) / name).symlink_to(tree.resolve() / folder)
        path = os.pathsep.join([names, str(tree.resolve()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        command = [sys.executable, "-m", "dsv3_cli.main", "train", recipe, f"runtime.run_dir={run}", *overrides]
        with open(run.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path},
                cwd=tree,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            start = time.monotonic()
            while process.poll() is None and len(steps_of(run)) < steps and time.monotonic() - start < limit:
                time.sleep(0.5)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = steps_of(run)
    if len(done) < steps:
        print(run.with_suffix(".log").read_text()[-3000:])
    return done[:steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path(".")])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--from", dest="first", type=int, default=60)
    parser.add_argument("--limit", type=float, default=240, help="seconds for each tree")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    losses = []
    for number, tree in enumerate(arguments.trees):
        run = arguments.out.resolve() / f"{arguments.recipe}-{number}"
        steps = train(tree, arguments.recipe, arguments.overrides, run, arguments.steps, arguments.limit)
        late = [step for step in steps if step["step"] > arguments.first]
        if not late:
            print(f"{tree}: {len(steps)} steps")
            continue

        def median(of, late=late):
            return statistics.median(map(of, late))

        phases = {
            name: round(1e3 * median(lambda step, name=name: step["breakdown"][name]), 1)
            for name in late[0]["breakdown"]
        }
        print(
            f"{tree}: {len(late)} steps, {1e3 * median(lambda step: step['step_seconds']):.1f} ms, "
            f"{median(lambda step: step['tokens_per_second']):,.0f} tokens/s, "
            f"{max(step['memory_gib'] for step in late):.1f} GiB, ms {phases}",
            flush=True,
        )
        losses.append([step["loss"] for step in steps])
    for at in (0, 9, 19, 29, 49, 89, 149, 199):
        if len(losses) > 1 and all(len(some) > at for some in losses):
            print(f"loss of step {at + 1}: {[round(some[at], 6) for some in losses]}")


if __name__ == "__main__":
    main()
