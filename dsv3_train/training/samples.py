"""What the samples of a run are: the text that it trains on, or passes over, by sample number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.errors import UserError
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed
from dsv3_train.training import data_identity, indices, skips


@dataclass(frozen=True)
class Sample:
    """One training sequence."""

    number: int
    reason: Union[str, None]
    """Why it is passed over; None: it is not."""
    step: Union[int, None]
    """At which that was found."""
    tokens: list[int]
    text: Union[str, None]
    """None without a tokenizer."""


def samples(run_dir: Path, asked: list[str]) -> list[Sample]:
    """Samples of a run: `FIRST-LAST` or one number each, or `skipped` for all that it passes over.

    Raises:
        UserError: no run is there, a sample is not one of its, or its data is gone.
    """
    recipe_file = run_dir / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{recipe_file}: missing; --samples needs a run directory, for the recipe orders the samples")
    recipe = load(str(recipe_file))
    known = skips.Skips(run_dir, recipe.faults.skip_samples).all
    total = Schedules(recipe).total_samples
    numbers = list(dict.fromkeys(number for text in asked for number in _numbers(text, known, total)))
    distributed.prepare_import(distributed.device_of(recipe))
    data_identity.refuse_other(recipe, run_dir)
    dataset, _ = indices.of_run(recipe, run_dir)
    home = tokenizer_home.find(run_dir, recipe)
    tokenizer = home.tokenizer if home and home.sha256 else None
    found = []
    for number in numbers:
        tokens = dataset[number]["tokens"].tolist()
        skip = next((skip for skip in known if skip.first <= number <= skip.last), None)
        text = tokenizer.decode(tokens) if tokenizer else None
        why, step = (skip.reason, skip.step) if skip else (None, None)
        found.append(Sample(number, why, step, tokens, text))
    return found


def _numbers(text: str, known: list[skips.Skip], total: int) -> Iterator[int]:
    if text == "skipped":
        for skip in known:
            yield from range(skip.first, min(skip.last, total - 1) + 1)
        return
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise UserError(f"--samples: {text!r}: give FIRST-LAST, one number, or skipped")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers or numbers[-1] >= total:
        raise UserError(f"--samples: {text}: the run has samples 0 to {total - 1}")
    yield from numbers
