"""What a checkpoint holds, and the position of a run within its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import convert_cuda_rng_state

from dsv3_train.checkpoint.tokenizer_home import TOKENIZER
from dsv3_train.model.init import sharding_metadata
from dsv3_train.optim.build import begin_moments
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.recipe.schema import Recipe


@dataclass
class Position:
    """How far a run is. Schedules and data follow from it alone."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def advance(self, batch_size: int, sequence_length: int) -> None:
        """By one step of so many sequences."""
        self.step += 1
        self.consumed_samples += batch_size
        self.consumed_tokens += batch_size * sequence_length


@dataclass
class Guarded:
    """What a run knows of bad batches (training/skips.py, training/spikes.py)."""

    losses: list[float] = field(default_factory=list)
    """Of the last steps, oldest first: what a spike is measured against."""
    skipped: list[list[int]] = field(default_factory=list)
    """(first, last) sample of what was passed over on the way to here."""


def topology(recipe: Recipe) -> dict[str, Any]:
    """The layout of a run, as checkpoints and the run directory record it."""
    return {
        "world_size": recipe.parallel.world_size,
        "tensor": recipe.parallel.tensor,
        "pipeline": recipe.parallel.pipeline,
        "virtual_stages": recipe.pipeline.virtual_stages,
        "context": recipe.parallel.context,
        "expert": recipe.parallel.expert,
        "expert_tensor": recipe.parallel.expert_tensor,
        "data": recipe.parallel.data,
        "zero1": recipe.parallel.zero1,
    }


def model_state(chunks: list[GPTModel]) -> dict[str, dict]:
    """Sharded weights and routing biases (FP32) of this rank's chunks; the keys are the same in any layout.

    TE's `_extra_state` stays out: only delayed scaling keeps anything there, and a checkpoint must not depend on
    which layers wrote it.
    """
    states = {}
    for i, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata=sharding_metadata())
        # (TE's grouped layers number theirs by expert: `_extra_state1`.)
        states[f"model{i}"] = {name: entry for name, entry in state.items() if "_extra_state" not in name}
    return states


def set_model_state(chunks: list[GPTModel], loaded: dict[str, dict]) -> None:
    """Put what was loaded for `model_state` into the chunks."""
    for i, chunk in enumerate(chunks):
        missing, surplus = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        wrong = [name for name in [*missing, *surplus] if "_extra_state" not in name]
        if wrong:
            raise RuntimeError(f"weights without a place, or places without a weight: {wrong}")


def training_state(
    recipe: Recipe,
    position: Position,
    guarded: Guarded,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer,
    ema: ParameterEma | None,
    *,
    loading: bool,
    with_random_state: bool,
    tokenizer: str | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that a resumed run needs, as Megatron's sharded state dict.

    Args:
        tokenizer: sha256 of the run's tokenizer.json, for TOKENIZER; None: not known.
        data: what it was trained on (training/data_identity.py).
    """
    models = model_state(chunks)
    if not loading:
        begin_moments(optimizer)
    state: dict[str, Any] = {
        **models,
        "optimizer": optimizer.sharded_state_dict(models, is_loading=loading, metadata=sharding_metadata()),
        "position": asdict(position),
        "guarded": asdict(guarded),
        "topology": topology(recipe),
        TOKENIZER: tokenizer,
        "data": data or {},
    }
    if ema is not None:
        state["ema"] = ema.sharded_state_dict()
    if with_random_state:
        rank = torch.distributed.get_rank()
        world = torch.distributed.get_world_size()
        state["random"] = ShardedObject("random", random_state(), (world,), (rank,))
    return state


def random_state() -> dict[str, Any]:
    """The state of this rank's random number generators, as tensors."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    megatron = {name: convert_cuda_rng_state(state) for name, state in tracked.items()}
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "megatron": megatron}


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`. Generators stay the same objects: a CUDA graph advances those that it knows."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracked = tracker.get_states()
    for name, saved in state["megatron"].items():
        if isinstance(tracked.get(name), torch.Generator):
            tracked[name].set_state(saved)
        else:
            tracked[name] = saved
    tracker.set_states(tracked)
