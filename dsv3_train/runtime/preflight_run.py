"""The pre-flight checks of a recipe: as the first seconds of a run, and as a command of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.rendezvous import Presence, meet

if TYPE_CHECKING:
    from dsv3_train.runtime.preflight import Measurement


@dataclass(frozen=True)
class Report:
    """What the checks found; that all nodes are whole and alike goes without saying, for else there is none."""

    everyone: list[Presence]
    measured: list[Measurement]
    slow: list[str]


def join(recipe: Recipe, device: str, run_dir: Path) -> list[str]:
    """Meet the other ranks and divide into groups; what is slow, in words, on every rank. Collective.

    Raises:
        UserError: a rank is missing, a node is broken or has other versions: named.
    """
    if not recipe.faults.preflight:
        _meet(recipe, device, Presence(int(os.environ["RANK"])))
        return []
    return [f"pre-flight: {line}" for line in _check(recipe, device, run_dir).slow]


def run(ref: str, overrides: list[str], show: Callable[[Report], None]) -> None:
    """Check the machines that would train a recipe; `show` is called on rank 0.

    Raises:
        UserError: as `join`; or the recipe is at fault.
        SystemExit: something is slow (1).
    """
    recipe = load(ref, overrides)
    device = distributed.device_of(recipe)
    if device == "cpu":
        distributed.prepare_import(device, recipe)  # once, before ranks are forked

    def on_rank() -> None:
        distributed.prepare_import(device, recipe)
        report = _check(recipe, device, Path(recipe.runtime.run_dir.format(name=recipe.name)))
        if int(os.environ["RANK"]) == 0:
            show(report)
        distributed.stop()
        if report.slow:
            raise SystemExit(1)

    launch(on_rank, recipe.parallel.world_size, device)


def _check(recipe: Recipe, device: str, run_dir: Path) -> Report:
    from dsv3_train.runtime import preflight

    everyone = _meet(recipe, device, preflight.presence(recipe, device, run_dir, int(os.environ["RANK"])))
    measured = preflight.measure(device)
    return Report(everyone, measured, preflight.slow(measured, recipe.faults.slow_factor))


def _meet(recipe: Recipe, device: str, me: Presence) -> list[Presence]:
    store, everyone = meet(me, recipe.faults.join_seconds, recipe.parallel.gpus_per_node)
    distributed.start(recipe, device, store)
    return everyone
