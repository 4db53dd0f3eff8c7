"""What a run says of itself at its end."""

from __future__ import annotations

from pathlib import Path

from dsv3_train.checkpoint.state import Position
from dsv3_train.data import manifest
from dsv3_train.data.sets import train_sets
from dsv3_train.recipe.schema import Recipe


def summary(recipe: Recipe, run_dir: Path, position: Position, last_validation: float | None) -> str:
    """The last lines of a run's log: its length, and its loss beside that of a model that knows only frequencies."""
    text = f"done: {position.step} steps, {position.consumed_tokens:,} tokens, in {run_dir}"
    entropies = [found.unigram_entropy for found in (manifest.load(one.path) for one in train_sets(recipe)) if found]
    if last_validation is not None and len(entropies) == 1:
        text += (
            f"\nlast validation loss {last_validation:.3f} nats per token; "
            f"unigram entropy of the data {entropies[0]:.3f}"
        )
    return text
