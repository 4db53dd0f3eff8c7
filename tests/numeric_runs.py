"""Run directories with losses that are known, for the tests of `dsv3 numerics`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_train.recipe.load import dump, load

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")
TOKENS = 8 * 32
"""A global batch of tiny.yaml."""


def falling(steps: int = 40) -> np.ndarray:
    """Losses of which no two are alike, so that a shifted step shows."""
    return 3 + 4 * np.exp(-np.arange(1, steps + 1) / 15)


def line(step: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    """Of a training step, with what the comparison reads."""
    known = {"total_steps": 40, "consumed_tokens": step * TOKENS, "mtp_loss": loss, "grad_norm": 1.0}
    return {"kind": "step", "step": step, "loss": loss, **known, **fields}


def steps(losses: Sequence[float | None] | np.ndarray, **fields: Any) -> list[dict[str, Any]]:
    return [line(number, None if loss is None else float(loss), **fields) for number, loss in enumerate(losses, 1)]


def run_dir(path: Path, lines: list[dict[str, Any]], *overrides: str) -> Path:
    """A run directory of tiny.yaml in FP32 as `dsv3 train` leaves it, as far as the comparison looks."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump(load(TINY, ["precision.params=fp32", *overrides])))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path
