"""What a run directory says of its training: the recipe, and loss and gradient norm step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe


@dataclass(frozen=True)
class Series:
    """A run; its arrays are over the steps with a finite loss, in order."""

    run_dir: Path
    recipe: Recipe
    steps_n: np.ndarray
    """int64, counted from 1."""
    tokens_n: np.ndarray
    """int64, consumed after the step."""
    loss_n: np.ndarray
    """float64, nats per token."""
    mtp_loss_n: np.ndarray | None
    """The same of the MTP modules, NaN where a step has none; None: a model without."""
    grad_norm_n: np.ndarray
    """float64, before clipping; NaN where it was not finite."""
    validation: dict[int, float]
    """Step -> nats per token."""
    total_steps: int
    """Of the whole run, as planned."""
    passed_over: list[int]
    """Steps whose batch was not trained on."""
    not_finite: list[int]
    """Steps that were trained on a loss that is not finite."""
    origin: dict[str, Any]
    """Commit, versions and machine, as far as they are known."""


def read(run_dir: Path) -> Series:
    """A run that `dsv3 train` left, or is still at.

    Raises:
        UserError: it is none, or its files are damaged.
    """
    recipe_file, metrics = run_dir / "recipe.yaml", run_dir / "metrics.jsonl"
    if not recipe_file.is_file():
        raise UserError(f"{run_dir}: no run of `dsv3 train` (it has no recipe.yaml); give a run directory")
    if not metrics.is_file():
        raise UserError(f"{metrics}: not there; this run has not trained a step")
    recipe = load(str(recipe_file))
    lines, validation = _lines(metrics)
    trained = [line for line in lines.values() if line["kind"] == "step"]
    if not trained:
        raise UserError(f"{metrics}: holds no step; this run has not trained any")
    finite = [line for line in trained if line["loss"] is not None]
    return Series(
        run_dir=run_dir,
        recipe=recipe,
        steps_n=np.array([line["step"] for line in finite], dtype=np.int64),
        tokens_n=np.array([line["consumed_tokens"] for line in finite], dtype=np.int64),
        loss_n=_floats(finite, "loss"),
        mtp_loss_n=_floats(finite, "mtp_loss") if recipe.model.num_nextn_predict_layers else None,
        grad_norm_n=_floats(finite, "grad_norm"),
        validation={step: loss for step, loss in validation.items() if loss is not None},
        total_steps=trained[-1]["total_steps"],
        passed_over=[line["step"] for line in lines.values() if line["kind"] == "passed over"],
        not_finite=[line["step"] for line in trained if line["loss"] is None],
        origin=_origin(run_dir / "environment.json"),
    )


def _lines(metrics: Path) -> tuple[dict[int, dict[str, Any]], dict[int, float | None]]:
    """Step -> its line, and step -> validation loss. A line that goes back takes the place of all from there on."""
    lines: dict[int, dict[str, Any]] = {}
    validation: dict[int, float | None] = {}
    try:
        texts = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{metrics}: cannot read ({error.strerror or error})") from None
    for number, text in enumerate(texts, start=1):
        try:
            line = _checked(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts):  # a run that was killed while it wrote, or is writing now
                break
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{metrics}:{number}: no line of `dsv3 train` ({what}); mend or remove it") from None
        step = line["step"]
        if line["kind"] == "validation":
            validation[step] = line["loss"]
        elif line["kind"] in ("step", "passed over"):
            if lines and step <= next(reversed(lines)):
                lines = {known: kept for known, kept in lines.items() if known < step}
                validation = {known: loss for known, loss in validation.items() if known < step}
            lines[step] = line
    return lines, validation


_WHOLE = {"step": ("step", "consumed_tokens", "total_steps"), "passed over": ("step",), "validation": ("step",)}
_REAL = {"step": ("loss", "mtp_loss", "grad_norm"), "validation": ("loss",)}


def _checked(line: Any) -> dict[str, Any]:
    """A line whose fields are what they should be. ValueError, KeyError or TypeError otherwise."""
    for key in _WHOLE.get(line["kind"], ()):
        if type(line[key]) is not int or line[key] < 0:
            raise ValueError(f"{key} is {line[key]!r}")
    for key in _REAL.get(line["kind"], ()):
        value = line[key]
        if value is not None and (not isinstance(value, (int, float)) or value < 0):
            raise ValueError(f"{key} is {value!r}")
        if value == 0 and key != "grad_norm":  # nothing is relative to it
            raise ValueError(f"{key} is 0")
    return line


def _floats(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if line[key] is None else line[key] for line in lines], dtype=np.float64)


def _origin(environment: Path) -> dict[str, Any]:
    try:
        found = json.loads(environment.read_text(encoding="utf-8"))
        return {key: found.get(key) for key in ("dsv3_train", "commit", "versions", "gpus", "cpu")}
    except (OSError, ValueError, AttributeError):
        return {}
