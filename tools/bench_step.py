"""One GPU's step of a recipe on random tokens: wall, GPU and host time, kernels by name, and the host's own profile.

    python tools/bench_step.py dsv3_tiny [KEY=VALUE ...] [--kernels 25] [--host 25]

Of the project that Python finds first: run it in another checkout to compare.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Medians in ms: until the device is done, and until the host is."""
    wall, host = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        host.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        wall.append(1e3 * (time.perf_counter() - start))
    return statistics.median(wall), statistics.median(host)


def kernels_of(work: Callable[[], Any], count: int, name: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    total, number = sum(e.self_device_time_total for e in events) / 1e3, sum(e.count for e in events)
    print(f"{name}: GPU busy {total:.1f} ms, {number} kernels and copies", flush=True)
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:count]:
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:5d}  {event.key[:130]}")


def host_of(work: Callable[[], Any], count: int, name: str) -> None:
    profile = cProfile.Profile()
    profile.enable()
    work()
    profile.disable()
    print(f"{name}, on the host:")
    pstats.Stats(profile).sort_stats("tottime").print_stats(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--host", type=int, default=0)
    arguments = parser.parse_args()
    from dsv3_train.runtime import distributed
    from dsv3_train.runtime.launch import launch
    from dsv3_train.training.profile import ready

    recipe = ready(arguments.recipe, arguments.overrides)

    def on_rank() -> None:
        distributed.prepare_import("cuda", recipe)
        from dsv3_train.training.assemble import assemble
        from dsv3_train.training.profile import RandomSteps
        from dsv3_train.training.step import forward_backward, update

        distributed.start(recipe, "cuda")
        work = RandomSteps(recipe, "cuda", assemble(recipe, "cuda", drawn_on="cuda"))

        def gradients() -> None:
            forward_backward(work.trainer, work.values, work.batches, work.count)

        def update_weights() -> None:
            update(work.trainer, work.values)

        for _ in range(4):
            work.step()
        step, _ = timed(work.step, arguments.steps)
        tokens = work.values.batch_size * recipe.training.sequence_length
        parts = {
            name: timed(part, arguments.steps) for name, part in (("gradients", gradients), ("update", update_weights))
        }
        text = ", ".join(f"{name} {wall:.1f} (host {host:.1f})" for name, (wall, host) in parts.items())
        used, held = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        speed = f"step {step:.1f} ms, {1e3 * tokens / step:,.0f} tokens/s"
        print(f"{recipe.name}: {speed}; {text} ms; {used:.1f} GiB, reserved {held:.1f}")
        kernels_of(work.step, arguments.kernels, "step")
        if arguments.host:
            host_of(gradients, arguments.host, "gradients")
            host_of(update_weights, arguments.host, "update")
        distributed.stop()

    launch(on_rank, 1, "cuda")


if __name__ == "__main__":
    main()
