"""The pre-flight checks of a recipe: as the first seconds of a run, and as a command of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_train.recipe.load import load, settings
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed, heartbeat
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.rendezvous import Presence, meet
from dsv3_train.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from torch.distributed import Store

    from dsv3_train.runtime.preflight import Measurement


@dataclass(frozen=True)
class Report:
    """What the checks found; that all nodes are whole and alike goes without saying, for else there is none."""

    everyone: list[Presence]
    measured: list[Measurement]
    findings: list[str]
    """What is slow, and who computes otherwise."""
    notes: list[str]
    """What else is worth a line: the network interface."""


def join(recipe: Recipe, device: str, run_dir: Path) -> list[str]:
    """Meet the other ranks and divide into groups; what was found, in words, on every rank. Collective.

    Raises:
        UserError: a rank is missing, a node is broken or has other versions or another recipe: named.
    """
    if not recipe.faults.preflight:
        store, _, notes = _meet(recipe, Presence(int(os.environ["RANK"])))
        distributed.start(recipe, device, store)
        return notes
    report = _check(recipe, device, run_dir, run_dir)
    return [*report.notes, *(f"pre-flight: {line}" for line in report.findings)]


def run(ref: str, overrides: list[str], show: Callable[[Report], None]) -> None:
    """Check the machines that would train a recipe; `show` is called on rank 0.

    What each rank was at when one of them hung stays in RUN_DIR.preflight.

    Raises:
        UserError: as `join`; or the recipe is at fault.
        SystemExit: something is slow, or a rank computes otherwise (1).
    """
    recipe = load(ref, overrides)
    device = distributed.device_of(recipe)
    if device == "cpu":
        distributed.prepare_import(device, recipe)  # once, before ranks are forked

    def on_rank() -> None:
        distributed.prepare_import(device, recipe)
        run_dir = recipe.run_dir
        beside = run_dir.with_name(run_dir.name + ".preflight")  # the run itself may be under way
        report = _check(recipe, device, run_dir, beside)
        if int(os.environ["RANK"]) == 0:
            shutil.rmtree(beside, ignore_errors=True)
            show(report)
        distributed.stop()
        if report.findings:
            raise SystemExit(1)

    launch(on_rank, recipe.parallel.world_size, device)


def _check(recipe: Recipe, device: str, run_dir: Path, watched: Path) -> Report:
    """Meet, divide and measure; who hangs in that is ended and named, by what it leaves in `watched`."""
    from dsv3_train.runtime import preflight

    rank = int(os.environ["RANK"])
    store, everyone, notes = _meet(recipe, preflight.presence(recipe, device, run_dir, rank))
    beat = heartbeat.start(watched / "heartbeats", rank)
    watchdog = Watchdog(beat, watched, recipe.parallel.world_size, recipe.faults.hang_seconds)
    if recipe.faults.hang_seconds:
        watchdog.start()
    try:
        heartbeat.mark("pre-flight: process groups")
        distributed.start(recipe, device, store)
        measured = preflight.measure(device)
    finally:
        watchdog.stop()
    findings = preflight.different(measured) + preflight.slow(measured, recipe.faults.slow_factor)
    return Report(everyone, measured, findings, notes)


def _meet(recipe: Recipe, me: Presence) -> tuple[Store, list[Presence], list[str]]:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        me = replace(me, settings=settings(recipe))
    return meet(me, recipe.faults.join_seconds, recipe.parallel.gpus_per_node)
