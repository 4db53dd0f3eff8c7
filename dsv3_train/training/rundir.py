"""The run directory: what a run was, beside what it left."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv3_train import __version__
from dsv3_train.checkpoint.directory import complete
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import diff, load
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.environment import cpu_name, versions
from dsv3_train.training.speed import CONVENTION


def open_run_dir(run_dir: Path, recipe: Recipe, resolved: str, topology: dict[str, Any]) -> list[str]:
    """Make or reopen a run directory: `recipe.yaml` (resolved), `environment.json`, `topology.json`.

    A recipe that changed since the directory's last run takes the place of the old one, which is kept as
    `recipe-before-STEP.yaml`: what trained up to checkpoint STEP.

    Returns what differs from the recipe that ran here before, one line per setting.

    Raises:
        UserError: another model was trained here, or the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        notes = _keep_recipe_before(run_dir, recipe)
        _write(run_dir / "recipe.yaml", resolved)
        _write(run_dir / "topology.json", json.dumps(topology, indent=1))
        _write(run_dir / "environment.json", json.dumps(environment(), indent=1))
    except OSError as error:
        raise UserError(f"runtime.run_dir: {run_dir} cannot be written ({error.strerror}); set another") from None
    return notes


def _keep_recipe_before(run_dir: Path, recipe: Recipe) -> list[str]:
    latest = run_dir / "recipe.yaml"
    if not latest.is_file():
        return []
    changes = diff(load(str(latest)), recipe)
    other_model = [key for key, _, _ in changes if key.split(".")[0] == "model"]
    if other_model:
        raise UserError(
            f"{latest}: another model was trained here ({', '.join(other_model)}); "
            "set another runtime.run_dir, or remove this one"
        )
    checkpoints = complete(run_dir / "checkpoints")
    kept = run_dir / f"recipe-before-{checkpoints[-1].name if checkpoints else 'step_00000000'}.yaml"
    # One that is there already led to this checkpoint; what was tried since left nothing.
    if changes and not kept.exists():
        _write(kept, latest.read_text(encoding="utf-8"))
    return [f"recipe changed: {key} was {before}, is {now}" for key, before, now in changes]


def write_state(run_dir: Path, state: str) -> None:
    """Leave in RUN_DIR/state how the run is: running, preempted, finished, refused or failed."""
    with contextlib.suppress(OSError):  # a full disk: the exit code tells as much
        _write(run_dir / "state", state + "\n")


def environment() -> dict[str, Any]:
    """Versions of all parts, the machine, the command line, and what TFLOPS and MFU mean in this run."""
    import torch

    return {
        "dsv3_train": __version__,
        "commit": _commit(),
        "versions": versions(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "speed_convention": CONVENTION,
    }


def _commit() -> str | None:
    """Of the checkout that this code runs from; None where it was installed otherwise."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
