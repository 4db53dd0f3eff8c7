"""The run directory: what a run was, beside what it left."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv3_train import __version__
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe


def open_run_dir(run_dir: Path, recipe: Recipe, resolved: str, topology: dict[str, Any]) -> list[str]:
    """Make or reopen a run directory: `recipe.yaml` (resolved), `environment.json`, `topology.json`.

    Returns what differs from the recipe that ran here before, in words.

    Raises:
        UserError: another model was trained here, or the directory cannot be written.
    """
    notes = []
    before = run_dir / "recipe.yaml"
    if before.is_file():
        old = load(str(before))
        changed = [name for name in type(recipe).model_fields if getattr(old, name) != getattr(recipe, name)]
        if "model" in changed:
            keys = [k for k in type(recipe.model).model_fields if getattr(old.model, k) != getattr(recipe.model, k)]
            raise UserError(
                f"{before}: another model was trained here (model.{', model.'.join(keys)}); "
                "set another runtime.run_dir, or remove this one"
            )
        if changed:
            notes.append(f"the recipe changed since this directory's last run: {', '.join(changed)}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write(before, resolved)
        _write(run_dir / "topology.json", json.dumps(topology, indent=1))
        _write(run_dir / "environment.json", json.dumps(environment(), indent=1))
    except OSError as error:
        raise UserError(f"runtime.run_dir: {run_dir} cannot be written ({error.strerror})") from None
    return notes


def environment() -> dict[str, Any]:
    """Versions of all parts, the machine and the command line."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    packages = {}
    for name in ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers", "tensorboard"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    source = Path(__file__).parents[2]
    commit = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dsv3_train": __version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 and (source / ".git").exists() else None,
        "python": platform.python_version(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "gpus": gpus,
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "command": sys.argv,
    }


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
