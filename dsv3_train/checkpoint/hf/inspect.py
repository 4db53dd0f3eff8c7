"""`dsv3 convert inspect`: what a Hugging Face directory or a checkpoint holds: headers, and checksums."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from dsv3_train.checkpoint.checksums import faults
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import run
from dsv3_train.checkpoint.hf.files import itemsize
from dsv3_train.checkpoint.hf.names import SCALE
from dsv3_train.checkpoint.hf.published import differences, open_directory, wrong
from dsv3_train.checkpoint.hf.sharded import open_checkpoint


def is_published(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory (or looks most like one)."""
    return (path / "config.json").is_file() or any(path.glob("*.safetensors*"))


def inspect(path: Path, checksums: bool = True) -> dict[str, Any]:
    """Counts, types and bytes of a directory or checkpoint, and what is missing or surplus by its configuration.

    `weights`, `scales`: tensors; `beside`: tensors that are known to be no weights, by kind; `values`: numbers in the
    weights; `dtypes`: tensors of each type; `missing`,
    `surplus`: names; `problems`: what is damaged or wrong, one line each.

    Args:
        checksums: read all files of a checkpoint for the checksums that it keeps; else headers and sizes alone.

    Raises:
        UserError: neither of the two, or of a model that is not supported.
    """
    return _published(path) if is_published(path) else _sharded(resolve(path), checksums)


def _published(path: Path) -> dict[str, Any]:
    directory = open_directory(path)
    tensors = directory.tensors
    model = configs.model(directory.config, str(path / "config.json"))
    missing, surplus = differences(directory, model, directory.mtp)
    ours = {name: tensor for name, tensor in tensors.items() if name not in directory.beside}
    weights = [tensor for name, tensor in ours.items() if not name.endswith(SCALE)]
    return {
        "kind": "hugging-face",
        "path": str(path),
        "weights": len(weights),
        "scales": len(ours) - len(weights),
        "beside": dict(Counter(directory.beside.values())),
        "values": sum(prod(tensor.shape) for tensor in weights),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "files": len({tensor.file for tensor in tensors.values()}),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors.values())),
        "mtp": directory.mtp,
        "declared_mtp": directory.declared_mtp,
        "missing": missing,
        "surplus": surplus,
        "problems": [*directory.problems, *wrong(directory, model, directory.mtp)],
    }


def _sharded(path: Path, checksums: bool) -> dict[str, Any]:
    checkpoint, recipe = open_checkpoint(path), run.recipe_beside(path)
    missing, surplus = run.differences(checkpoint, recipe)
    weights = [tensor for key, tensor in checkpoint.tensors.items() if not run.is_training_state(key)]
    return {
        "kind": "megatron",
        "path": str(path),
        "weights": len(weights),
        "scales": 0,
        "values": sum(prod(tensor.shape) for tensor in weights),
        "bytes": sum(prod(tensor.shape) * itemsize(tensor.dtype) for tensor in weights),
        "files": len({chunk.file for tensor in weights for chunk in tensor.chunks}),
        "dtypes": dict(Counter(tensor.dtype for tensor in weights)),
        "mtp": recipe.model.num_nextn_predict_layers,
        "training_state": len(checkpoint.tensors) - len(weights),
        "missing": missing,
        "surplus": surplus,
        "problems": [*dict.fromkeys(run.wrong_shapes(checkpoint, recipe)), *(_faults(path) if checksums else ())],
    }


def _faults(path: Path) -> list[str]:
    try:
        return list(faults(path))
    except OSError as error:
        return [f"{error.filename or path}: {error.strerror}"]
