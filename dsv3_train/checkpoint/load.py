"""Reading checkpoints back, into any layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_train.checkpoint.directory import check_safe
from dsv3_train.checkpoint.state import (
    Position,
    model_state,
    set_model_state,
    set_random_state,
    topology,
    training_state,
)
from dsv3_train.errors import UserError
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.recipe.schema import Recipe


def load_training(
    path: Path, recipe: Recipe, chunks: list[GPTModel], optimizer: MegatronOptimizer, ema: ParameterEma | None
) -> tuple[Position, list[str]]:
    """Put a checkpoint into model, optimizer and average; returns the position and what was not restored, in words.

    The layout may be another than the one that saved. Collective.

    Raises:
        UserError: not a checkpoint, damaged, or of another model.
    """
    common = _common(path)
    notes = []
    same_layout = common["topology"] == topology(recipe)
    state = training_state(recipe, Position(), chunks, optimizer, ema, loading=True, with_random_state=same_layout)
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    if ema is not None and not any(key.startswith("ema.") for key in saved):
        del state["ema"]
        notes.append("the checkpoint has no parameter average: it starts anew from the parameters")
    loaded = _load(path, state, saved)
    set_model_state(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    if "ema" in loaded and ema is not None:
        ema.load_state_dict(loaded["ema"])
    if same_layout:
        set_random_state(loaded["random"])
    return Position(**loaded["position"]), notes


def load_weights(path: Path, chunks: list[GPTModel]) -> Position:
    """Put a checkpoint's weights and routing biases into `chunks`. Collective.

    Raises:
        UserError: not a checkpoint, damaged, or of another model.
    """
    common = _common(path)
    loaded = _load(path, dict(model_state(chunks)), dist_checkpointing.load_tensors_metadata(str(path)))
    set_model_state(chunks, loaded)
    return Position(**common["position"])


def _common(path: Path) -> dict[str, Any]:
    check_safe(path)
    # torch's planner reads the small objects of a checkpoint with weights_only=False; this overrules it.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        return dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:
        raise UserError(f"{path}/common.pt: cannot be read ({type(error).__name__}: {error})") from None


def _load(path: Path, state: dict, saved: dict[str, ShardedTensor]) -> dict:
    """Load after a check, tensor by tensor, that the checkpoint has what `state` asks for, in that shape."""
    faults = []
    for entry in nested_values(state):
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in nested_values({"pieces": pieces}):
            if not isinstance(piece, ShardedTensor):
                continue
            if piece.key not in saved:
                faults.append(f"no tensor {piece.key}")
            elif tuple(saved[piece.key].global_shape) != tuple(piece.global_shape):
                faults.append(f"{piece.key} is {list(saved[piece.key].global_shape)}, not {list(piece.global_shape)}")
    if faults:
        more = f" (and {len(faults) - 1} more differences)" if len(faults) > 1 else ""
        raise UserError(f"{path}: a checkpoint of another model: {faults[0]}{more}; check the recipe's model section")
    try:
        return dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException, OSError, EOFError, RuntimeError) as error:
        # torch collects what each rank met; its own text is all their tracebacks.
        causes = getattr(error, "failures", {0: (error,)})
        cause = next(iter(causes.values()))[0]
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(
            f"{path}: the checkpoint is damaged ({reason}); remove it to resume from an earlier one"
        ) from None
