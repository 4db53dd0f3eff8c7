"""How long a checkpoint lets training stand still, with optimizer states put together as here and as by Megatron-core.

    python tools/bench_checkpoint.py [RECIPE] [a.b=c ...]     # dsv3_100m, 3 GB; about 3 minutes on two CPU cores

One process; asynchronous saves, in turn the one way and the other; times are the least and the median of several.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch


def work(recipe: Any, device: str, saves: int) -> None:
    """One rank."""
    distributed.prepare_import(device, recipe)
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from dsv3_train.checkpoint.save import CheckpointWriter
    from dsv3_train.checkpoint.state import Guarded, Position, training_state
    from dsv3_train.optim.gather import fill
    from dsv3_train.training.assemble import assemble

    distributed.start(recipe, device)
    trainer = assemble(recipe, device)
    for buffer in (buffer for chunk in trainer.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        buffer.grad_data.fill_(1e-3)
    trainer.optimizer.step()  # moments begin to exist
    gc.freeze()  # as training/run.py
    ours = {one: one.get_parameter_state_dp_zero for one in trainer.optimizer.chained_optimizers}
    theirs = {one: partial(DistributedOptimizer.get_parameter_state_dp_zero, one) for one in ours}
    seconds: dict[str, list[float]] = {"here": [], "Megatron-core": []}
    whose = ""

    def saved(path: Path, stood_still: float) -> None:
        seconds[whose].append(stood_still)

    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as where:
        writer = CheckpointWriter(Path(where), 1, True, saved, lambda step, reason: print(reason))
        for step in range(1, 2 * saves + 1):
            whose, ways = ("Megatron-core", theirs) if step % 2 else ("here", ours)
            for one, way in ways.items():
                one.get_parameter_state_dp_zero = way
            state = partial(
                training_state, recipe, Position(step=step), Guarded(), trainer.models, trainer.optimizer, None,
                loading=False, with_random_state=True,
            )  # fmt: skip
            writer.save(state, step, partial(fill, trainer.optimizer))
            while writer._save is not None:
                time.sleep(0.1)  # training
                writer.poll()
        size = sum(path.stat().st_size for path in Path(where).rglob("*") if path.is_file()) / 1e9
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:14} {size:.1f} GB  least {min(values):6.2f} s  median {medians[name]:6.2f} s  of {len(values)}")
    print(f"ratio of the medians {medians['Megatron-core'] / medians['here']:.1f}")
    print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}, {recipe.name}")
    distributed.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="dsv3_100m")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--saves", type=int, default=3, help="of each kind")
    options = parser.parse_args()
    recipe = load(options.recipe, options.overrides)
    device = distributed.device_of(recipe)
    if device == "cpu":
        recipe = load(options.recipe, ["precision.params=fp32", *options.overrides])
    launch(lambda: work(recipe, device, options.saves), 1, device)


if __name__ == "__main__":
    main()
