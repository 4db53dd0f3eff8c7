"""Time and profile training steps of a recipe on random tokens: where a step's time goes on this machine.

python tools/profile_step.py dsv3_tiny training.micro_batch_size=8
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from dsv3_train.planner.flops import flops_per_token
from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch

STEPS = 10


def main() -> None:
    recipe = load(sys.argv[1], sys.argv[2:])
    device = distributed.device_of(recipe)
    distributed.prepare_import(device)
    launch(lambda: profile(recipe, device), recipe.parallel.world_size, device)


def profile(recipe, device: str) -> None:
    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.step import forward_backward, micro_batches_per_step, update

    distributed.start(recipe, device)
    trainer = assemble(recipe, device)
    schedules = Schedules(recipe)
    values = schedules.at(schedules.total_samples - 1)
    count = micro_batches_per_step(recipe, values.batch_size)
    size, length = recipe.training.micro_batch_size, recipe.training.sequence_length

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, recipe.model.vocab_size, (size, length + 1), device=device)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(length, device=device).expand(size, -1).contiguous(),
            "loss_mask": torch.ones(size, length, device=device),
        }

    batches = [batch() for _ in range(count)]

    def step() -> float:
        start = time.perf_counter()
        forward_backward(trainer, values, batches, count)
        update(trainer, values)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(5):
        step()
    seconds = statistics.median(step() for _ in range(STEPS))
    tokens = values.batch_size * length
    flops = flops_per_token(recipe.model, length, mtp=True) * tokens / recipe.parallel.world_size
    print(
        f"{seconds:.3f} s per step, {tokens / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.0f} TFLOPS per process"
    )
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities[: 2 if device == "cuda" else 1]) as trace:
        step()
    rows = trace.key_averages()
    if device == "cuda":
        kernels = [row for row in rows if row.self_device_time_total > 0]
        busy = sum(row.self_device_time_total for row in kernels) / 1e6
        print(f"GPU busy {busy:.3f} s of a step, {sum(row.count for row in kernels):,} kernels and copies")
        for row in sorted(kernels, key=lambda row: -row.self_device_time_total)[:25]:
            print(f"{row.self_device_time_total / 1e3:9.1f} ms {row.count:6d}  {row.key[:90]}")
    print("On the host:")
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:25]:
        print(f"{row.self_cpu_time_total / 1e3:9.1f} ms {row.count:6d}  {row.key[:90]}")
    distributed.stop()


if __name__ == "__main__":
    main()
