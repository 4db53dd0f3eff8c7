"""`dsv3 convert verify`: two sets of weights, tensor by tensor, whichever kind each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import run, work
from dsv3_train.checkpoint.hf.checks import Check, check, in_turn
from dsv3_train.checkpoint.hf.files import Stored
from dsv3_train.checkpoint.hf.inspect import is_published
from dsv3_train.checkpoint.hf.names import weights
from dsv3_train.checkpoint.hf.published import Directory, open_directory, readable
from dsv3_train.checkpoint.hf.sides import Published, Side, blocks
from dsv3_train.checkpoint.hf.work import Progress
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Model, Recipe
from dsv3_train.runtime.workers import each, pool

_TASK = 1 << 30  # bytes of one worker's task, about
SMALL = 100_000_000
"""Values of a model whose logits take no time to speak of."""


@dataclass(frozen=True)
class Weights:
    """One of the two."""

    path: Path
    tensors: dict[str, Side]
    """By published name; scales go with their weights."""
    model: Model
    directory: Directory | None
    """None: a checkpoint."""
    recipe: Recipe | None

    @property
    def values(self) -> int:
        """How many it holds."""
        return sum(side.weight.values for side in self.tensors.values())

    @property
    def has_main_model(self) -> bool:
        """Whether the model is whole, MTP apart."""
        return all(weight.name in self.tensors for weight in weights(self.model, 0))


def open_weights(path: Path) -> Weights:
    """A Hugging Face directory or a checkpoint (or the run that it is in).

    Raises:
        UserError: neither, damaged, or of a model that is not supported.
    """
    if not is_published(path):
        checkpoint = resolve(path)
        recipe = run.recipe_beside(checkpoint)
        side = run.checkpoint_side(checkpoint, recipe)
        return Weights(checkpoint, {one.weight.name: one for one in side}, recipe.model, None, recipe)
    directory = open_directory(path)
    model = configs.model(directory.config, str(path / "config.json"), directory.mtp)
    found = readable(directory, model, directory.mtp)
    return Weights(path, {one.weight.name: one for one in found}, model, directory, None)


def verify(a: Weights, b: Weights, workers: int | None, progress: Progress) -> dict[str, Any]:
    """Compare by value: FP8 through FP32, BF16 as FP32; two FP8 tensors by codes and scales.

    `tensors`: weights that both have, `identical`: those of them without any difference, `max_abs_difference`: of
    all values, `missing`: what only A has, `surplus`: what only B has, `different`: names.

    Raises:
        UserError: a tensor is damaged.
    """
    names = [name for name in a.tensors if name in b.tensors]
    pairs = [(a.tensors[name], b.tensors[name]) for name in names]
    shapes = [name for name, (one, other) in zip(names, pairs, strict=True) if one.weight.shape != other.weight.shape]
    if shapes:
        ours, theirs = (list(of.tensors[shapes[0]].weight.shape) for of in (a, b))
        raise UserError(f"{b.path}: {shapes[0]} is {theirs}, and {ours} in {a.path}: another model")
    groups, total = _tasks(pairs)
    tasks: list[tuple[list[Check], list[tuple[Side, Side]]]] = []
    for group, to_check in zip(
        groups, in_turn([[side for pair in group for side in pair] for group in groups]), strict=True
    ):
        tasks += [([check], []) for check in to_check[1:]] + [(to_check[:1], group)]
    done, differing, largest = 0, [], 0.0
    progress("comparing", 0, total)
    with pool(min(work.worker_count(workers, total), len(tasks) or 1)) as executor:
        for number, result in each(executor, compare, tasks):
            for (one, _), (same, difference) in zip(tasks[number][1], result, strict=True):
                done += one.weight.values
                largest = max(largest, difference)
                if not same:
                    differing.append(one.weight.name)
            progress("comparing", done, total)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "tensors": len(names),
        "identical": len(names) - len(differing),
        "max_abs_difference": largest,
        "missing": _only(a, b),
        "surplus": _only(b, a),
        "different": sorted(differing),
    }


def _only(one: Weights, other: Weights) -> list[str]:
    """What one has and the other lacks, but for MTP's copies of what both have."""
    both = {side.weight.key for name, side in one.tensors.items() if name in other.tensors}
    names = one.tensors.keys() - other.tensors.keys()
    return sorted(
        name for name in names if not (one.tensors[name].weight.copy and one.tensors[name].weight.key in both)
    )


def _tasks(pairs: Sequence[tuple[Side, Side]]) -> tuple[list[list[tuple[Side, Side]]], int]:
    tasks: list[list[tuple[Side, Side]]] = []
    size, total = _TASK, 0
    for pair in pairs:
        values = pair[0].weight.values
        total += values
        if size + 8 * values > _TASK:
            tasks.append([])
            size = 0
        tasks[-1].append(pair)
        size += 8 * values
    return tasks, total


def compare(to_check: Sequence[Check], pairs: Sequence[tuple[Side, Side]]) -> list[tuple[bool, float]]:
    """(identical, largest difference) of each pair, after a look at the checksums of files."""
    torch.set_num_threads(1)
    for one in to_check:
        check("", *one)
    return [_compare(one, other) for one, other in pairs]


def _compare(one: Side, other: Side) -> tuple[bool, float]:
    same, largest = True, 0.0
    for first, last in blocks(one.weight):
        left, right = (side.rows(first, last).float() for side in (one, other))
        if torch.equal(left.view(torch.int32), right.view(torch.int32)):
            continue
        same = False
        largest = max(largest, float((left - right).abs().max()))
    # The same values may have other codes with other scales.
    if same and isinstance(one, Published) and isinstance(other, Published) and one.scale and other.scale:
        same = _same_bytes(one.stored, other.stored) and _same_bytes(one.scale, other.scale)
    return same, largest


def _same_bytes(one: Stored, other: Stored) -> bool:
    return torch.equal(one.read().view(torch.uint8), other.read().view(torch.uint8))
