"""Which runs may be compared: those that differ in how they compute, and in nothing that they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_train.errors import UserError
from dsv3_train.numerics.series import Series
from dsv3_train.recipe.load import diff, load
from dsv3_train.recipe.schema import Recipe

SEEDS = ("training.seed", "data.seed")
_FREE = (
    "name", "description", "parallel", "pipeline", "logging", "runtime", "checkpoint", "faults",
    "data.workers", "training.recompute", "training.micro_batch_size", "training.eval_interval",
)  # fmt: skip
_BOUND = (
    "checkpoint.load", "faults.skip_samples", "faults.spike", "faults.spike_window", "faults.spike_batches",
    "faults.max_rollbacks",
)  # fmt: skip
"""Of the free ones, what changes the weights or the data of a run nevertheless."""

LEAST_STEPS = 20
"""Of each run, for a comparison."""


def _is_of(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def differences(a: Recipe, b: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of what decides how a run goes: all but layout, names, logging, checkpoints."""
    for key, left, right in diff(a, b):
        if _is_of(key, _BOUND) or not _is_of(key, _FREE):
            yield key, left, right


def same_seeds(a: Recipe, b: Recipe) -> bool:
    """Whether two runs have all of `SEEDS` in common."""
    return not any(key in SEEDS for key, _, _ in differences(a, b))


def refuse_other_training(baseline: Series, run: Series, *, seed: bool) -> None:
    """Refuse a run that trained something else than the baseline.

    Args:
        seed: it is there for its other seed: seeds may differ, one has to, and the precision may not.

    Raises:
        UserError: names the key.
    """
    found = list(differences(baseline.recipe, run.recipe))
    for key, left, right in found:
        if key in SEEDS:
            if seed:
                continue
            fix = "give it, or the baseline of its seed, with --seeds"
        elif _is_of(key, ("precision",)):
            if not seed:
                continue
            fix = "give it as a run, not with --seeds"
        else:
            fix = "losses of different trainings say nothing about precision"
        raise UserError(f"{run.run_dir}: {key} is {right!r}, and {left!r} in {baseline.run_dir}; {fix}")
    if seed and not found:
        raise UserError(f"{run.run_dir}: has the same seeds as {baseline.run_dir}; set training.seed to another one")


def refuse_changed(run: Series) -> None:
    """Refuse a run that went on under another recipe than it began with.

    Raises:
        UserError: names the key and the file that keeps the earlier recipe.
    """
    for earlier in sorted(run.run_dir.glob("recipe-before-step_*.yaml")):
        if _step_of(earlier) == 0:  # nothing was trained under it
            continue
        for key, before, now in differences(load(str(earlier)), run.recipe):
            raise UserError(
                f"{earlier}: {key} was {before!r} up to step {_step_of(earlier)}, then {now!r}; a run that changed on "
                "the way compares with none"
            )


def _step_of(earlier: Path) -> int:
    digits = earlier.stem.removeprefix("recipe-before-step_")
    return int(digits) if digits.isdigit() else -1


def notes(baseline: Series, run: Series) -> list[str]:
    """What someone who reads the comparison should know."""
    told = []
    for series in (baseline, run):
        if series.steps_n[-1] < series.total_steps:
            told.append(f"{series.run_dir} is at step {series.steps_n[-1]} of {series.total_steps}")
    if run.not_finite:
        told.append(f"{run.run_dir}: no finite loss at {_some(run.not_finite)}")
    if run.passed_over != baseline.passed_over:
        for series in (baseline, run):
            if series.passed_over:
                told.append(f"{series.run_dir}: batches passed over at {_some(series.passed_over)}")
    for key, what in (("commit", "commit"), ("versions", "package versions"), ("gpus", "GPUs"), ("cpu", "CPU")):
        ours, theirs = baseline.origin.get(key), run.origin.get(key)
        if ours and theirs and ours != theirs:
            told.append(f"{baseline.run_dir} and {run.run_dir} differ in {what} (environment.json)")
    return told


def _some(steps: list[int]) -> str:
    first = ", ".join(map(str, steps[:3]))
    return f"step {first}" if len(steps) == 1 else f"{len(steps)} steps ({first}{', ...' if len(steps) > 3 else ''})"
