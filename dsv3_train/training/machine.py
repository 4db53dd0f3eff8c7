"""Whether a recipe can run on this machine: asked before any process of it starts, and told by a GPU that is full."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from dsv3_train.errors import UserError
from dsv3_train.planner.states import state_bytes
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.environment import probe
from dsv3_train.runtime.lacks import lacks

_LARGE = 1 << 30
"""Bytes of weights, gradients and optimizer states in a process from which what the machine lacks is worth a word."""


def refuse_machine(recipe: Recipe, device: str) -> None:
    """Refuse to start here what this machine cannot hold or compute: thousands of processes, to begin with.

    Raises:
        UserError: names the key, or what is missing.
    """
    world = recipe.parallel.world_size
    if device == "cuda":
        import torch

        if world > torch.cuda.device_count():
            raise UserError(
                f"parallel.world_size: {world} GPUs, and {torch.cuda.device_count()} here; use fewer processes, or "
                "start it with srun (dsv3 slurm submit) or torchrun on the machines that have them"
            )
    elif world > 1 or recipe.precision.fp8 != "none" or state_bytes(recipe) > _LARGE:
        found = lacks(recipe, probe(), state_bytes(recipe))
        if errors := [text for severity, text in found if severity == "error"]:
            raise UserError("\n".join(errors))
        for _, text in found if state_bytes(recipe) > _LARGE else ():
            print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def told_when_full(recipe: Recipe, fitted: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Refuse what fills the GPU, unless a step has fitted: then another may again, and the run is worth a new start.

    Args:
        fitted: whether a step has been done.

    Raises:
        UserError: the GPU is full; names the keys that ask for less.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        if fitted():
            raise
        training = recipe.training
        further = [module for module in ("layernorm", "mla_up_proj", "moe_act") if module not in training.recompute]
        ways = [
            *(["training.micro_batch_size=1"] if training.micro_batch_size > 1 else []),
            *([f"training.recompute=[{', '.join([*training.recompute, *further])}]"] if further else []),
            "more of parallel.pipeline or parallel.expert",
        ]
        said = str(error).split(" Of the allocated")[0].strip()
        raise UserError(f"{said} To ask for less: {', '.join(ways)} (dsv3 train ... --dry-run counts it)") from None
