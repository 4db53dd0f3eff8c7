"""What a recipe may name, and nothing here can do yet."""

from __future__ import annotations

from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe


def refuse_unready(recipe: Recipe) -> None:
    """Refuse what a run cannot do.

    Raises:
        UserError: naming the key and what to set instead.
    """
    refuse_unbuilt(recipe)
    if recipe.model.scoring_func != "sigmoid":
        raise UserError("model.scoring_func: softmax cannot train yet; set model.scoring_func=sigmoid for a new model")


def refuse_unbuilt(recipe: Recipe) -> None:
    """Refuse what the model cannot be built for.

    Raises:
        UserError: as `refuse_unready`.
    """
    if recipe.parallel.context > 1:
        raise UserError("parallel.context: context parallelism cannot run yet; set parallel.context=1")
