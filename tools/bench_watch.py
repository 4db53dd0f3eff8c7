"""What `logging.pipeline_interval` costs: steps watched and not watched in turn, on this machine's processes.

    python tools/bench_watch.py smoke_parallel --steps 40

Prints the least and the median step of both kinds; with `logging.pipeline_interval: N` a run pays the difference once
in N steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch


def work(recipe, device: str, steps: int) -> None:
    """One rank."""
    from dsv3_train.profiling.live import Watch
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.profile import RandomSteps

    distributed.start(recipe, device)
    random_steps = RandomSteps(recipe, device, assemble(recipe, device))
    watch = Watch(recipe, Path("."), random_steps.trainer)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * steps + 4):  # pipeline_interval is 2: every other step is watched
        torch.distributed.barrier()
        start = time.perf_counter()
        watch.watched(random_steps.step, number)()
        watch.figures(number)
        if number >= 4:
            seconds[number % 2 == 0].append(time.perf_counter() - start)
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(100):
        watch.figures(0)
    alone = (time.perf_counter() - start) / 100
    if torch.distributed.get_rank() == 0:
        for watched, taken in seconds.items():
            name = "watched" if watched else "not watched"
            print(f"{name:12s} least {min(taken) * 1e3:8.2f} ms, median {statistics.median(taken) * 1e3:8.2f} ms")
        print(f"figures of a step alone: {alone * 1e3:.3f} ms")
    distributed.stop()


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    recipe = load(options.recipe, [*options.overrides, "logging.pipeline_interval=2"])
    device = distributed.device_of(recipe)
    distributed.prepare_import(device)
    launch(lambda: work(recipe, device, options.steps), recipe.parallel.world_size, device)


if __name__ == "__main__":
    main()
