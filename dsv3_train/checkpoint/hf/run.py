"""A checkpoint together with the recipe beside it: which published tensors its values are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsv3_train.checkpoint.hf.names import Weight, refuse_more, weights
from dsv3_train.checkpoint.hf.sharded import Checkpoint, open_checkpoint
from dsv3_train.checkpoint.hf.sides import Sharded
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe

_TRAINING_STATE = ("optimizer.", "ema.", "chained_", "random")


def recipe_beside(checkpoint: Path) -> Recipe:
    """The recipe of the run that `checkpoint` (RUN/checkpoints/step_N) lies in.

    Raises:
        UserError: there is none.
    """
    file = checkpoint.parent.parent / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{file}: missing; a checkpoint's run directory holds the recipe of its model")
    return load(str(file))


def differences(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[str], list[str]]:
    """(missing, surplus): tensors that the model has and the checkpoint lacks, and the other way round.

    The training state (optimizer, averages, random numbers) is no surplus.
    """
    wanted = {weight.key for weight in _weights(checkpoint, recipe)}
    surplus = [key for key in checkpoint.tensors if key not in wanted and not is_training_state(key)]
    return sorted(wanted - checkpoint.tensors.keys()), sorted(surplus)


def checkpoint_side(path: Path, recipe: Recipe, mtp: int | None = None) -> list[Sharded]:
    """Every published tensor of the model, each with its place in the checkpoint at `path`.

    Raises:
        UserError: the checkpoint is damaged, or of another model.
    """
    checkpoint = open_checkpoint(path)
    missing, surplus = differences(checkpoint, recipe)
    faults = [f"no tensor {key}" for key in missing]
    faults += [f"{key} is no tensor of the recipe's model" for key in surplus]
    faults += dict.fromkeys(wrong_shapes(checkpoint, recipe))
    if faults:
        more = f" (and {len(faults) - 1} more differences)" if len(faults) > 1 else ""
        raise UserError(f"{path}: a checkpoint of another model: {faults[0]}{more}; check recipe.yaml beside it")
    return [Sharded(weight, path, checkpoint.tensors[weight.key].dtype) for weight in _weights(checkpoint, recipe, mtp)]


def is_training_state(key: str) -> bool:
    """Whether a checkpoint's tensor is no weight: of the optimizer, an average, a random number generator."""
    return key.startswith(_TRAINING_STATE)


def wrong_shapes(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """`KEY is [..], not [..]` for each tensor that has another shape than the recipe's model."""
    for weight in _weights(checkpoint, recipe):
        tensor = checkpoint.tensors.get(weight.key)
        if tensor is not None and tensor.shape != weight.key_shape:
            yield f"{weight.key} is {list(tensor.shape)}, not {list(weight.key_shape)}"


def _weights(checkpoint: Checkpoint, recipe: Recipe, mtp: int | None = None) -> tuple[Weight, ...]:
    modules = recipe.model.num_nextn_predict_layers if mtp is None else mtp
    # Each expert has a row of its own, in which gate and up are fused.
    there = sum(
        2 * tensor.shape[0] if ".experts.experts." in key else 2
        for key, tensor in checkpoint.tensors.items()
        if tensor.shape
    )
    refuse_more(recipe.model, modules, there, f"{checkpoint.path}: recipe.yaml beside it")
    return weights(recipe.model, modules)
