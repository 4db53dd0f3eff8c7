"""Which datasets a recipe trains on, and which of their documents are for validation."""

from __future__ import annotations

from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Dataset, Recipe


def train_sets(recipe: Recipe) -> list[Dataset]:
    """The training datasets; where the recipe names none, what it prepares.

    Raises:
        UserError: it does neither.
    """
    data = recipe.data
    if data.train:
        return data.train
    if data.prepare:
        return [Dataset(path=data.prepare.output)]
    raise UserError("data.train: names no dataset; give prefixes of datasets, or data.prepare to make one")


def first_valid(recipe: Recipe, documents: int) -> int:
    """Where a training dataset's validation documents begin; `documents` if none are set aside."""
    if recipe.data.valid:
        return documents
    return round((1 - recipe.data.valid_fraction) * documents)
