"""Training runs that tests compare; each is made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from parity import in_processes, train, whole


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """Train a recipe in as many processes as it wants; returns rank 0's losses and the global tensors.

    Further arguments are `parity.train`'s.
    """
    distributed.prepare_import("cpu")
    import dsv3_train.training.assemble  # noqa: F401  once, before forking

    done: dict[str, dict[str, Any]] = {}

    def train_once(recipe: Recipe, **options: Any) -> dict[str, Any]:
        key = recipe.model_dump_json() + repr(sorted(options.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("parity")
            world = recipe.parallel.world_size
            in_processes(functools.partial(train, recipe, out, **options), world)
            first = torch.load(out / "0.pt", weights_only=False)
            done[key] = first | {what: whole(out, world, what) for what in ("gradients", "weights")}
        return done[key]

    return train_once
