"""What a checkpoint keeps of the Hugging Face directory that it came from, so that it can go back as it was.

Beside the checkpoint, in `hf/`: the files that are no weights (config.json, licence, code, which is never run), the
index, and the types of tensors in `tensors.json`. The tokenizer's files have a place of their own
(checkpoint/tokenizer_home.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_train import regular
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf.names import Weight
from dsv3_train.checkpoint.hf.published import INDEX, Directory, open_directory
from dsv3_train.data.special_tokens import FILES
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load

FOLDER = "hf"
PREFIX = "hf:"
"""Of `checkpoint.load`: a Hugging Face directory."""
_TENSORS = "tensors.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_DEEPEST = 10  # runs that began from one another's checkpoints


@dataclass(frozen=True)
class Origin:
    """A directory's configuration, other files, and how its tensors were stored."""

    folder: Path
    config: dict[str, Any]
    main_dtype: str
    mtp: int
    """MTP modules that the files had."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Types of the tensors whose type does not follow from `main_dtype`."""

    @property
    def index(self) -> dict[str, Any] | None:
        """model.safetensors.index.json; None for one file without an index."""
        file = self.folder / INDEX
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def usual_dtype(weight: Weight, main_dtype: str) -> str:
    """How a tensor is stored in files whose matrices are `main_dtype`."""
    if weight.stored == "fp32":
        return "F32"
    return "BF16" if main_dtype == "F8_E4M3" and weight.stored != "fp8" else main_dtype


def exceptions(directory: Directory, weights: Iterable[Weight]) -> dict[str, str]:
    """Types of tensors that are stored otherwise than usual."""
    main = directory.main_dtype
    stored = {weight.name: directory.tensors[weight.name].dtype for weight in weights}
    return {weight.name: stored[weight.name] for weight in weights if stored[weight.name] != usual_dtype(weight, main)}


def keep(directory: Directory, weights: list[Weight], folder: Path) -> None:
    """Write `folder`: everything of a directory but its weights and its tokenizer."""
    folder.mkdir(exist_ok=True)
    copy_others(directory.path, folder)
    if directory.weight_map is not None:
        (folder / INDEX).write_bytes(regular.contents(directory.path / INDEX))
    facts = {"main_dtype": directory.main_dtype, "mtp": directory.mtp, "exceptions": exceptions(directory, weights)}
    (folder / _TENSORS).write_text(json.dumps(facts), encoding="utf-8")


def copy_others(source: Path, target: Path) -> list[str]:
    """Copy a directory's files that are neither weights, nor an index of them, nor the tokenizer's, nor ours.

    Returns a line for each that is left out: what a link leads to elsewhere, what is no file or too large.

    Raises:
        UserError: config.json is such a one.
    """
    notes = []
    for name, content in _others(source):
        if isinstance(content, bytes):
            (target / name).write_bytes(content)
        else:
            notes.append(f"left out: {content}")
    return notes


def left_out(source: Path) -> list[str]:
    """What `copy_others` would say, and the same errors, with the index looked at too."""
    if (source / INDEX).is_symlink():
        regular.contents(source / INDEX)
    return [f"left out: {content}" for _, content in _others(source) if isinstance(content, UserError)]


def _others(source: Path) -> Iterator[tuple[str, bytes | UserError]]:
    for file in sorted(source.iterdir()):
        theirs = not file.name.startswith(".") and not file.name.endswith(_WEIGHTS)
        if not theirs or file.name in (INDEX, _TENSORS, *FILES) or (file.is_dir() and not file.is_symlink()):
            continue
        try:
            yield file.name, regular.contents(file)
        except UserError as error:
            if file.name == "config.json":
                raise
            yield file.name, error


def find(checkpoint: Path) -> Origin | None:
    """The origin of a checkpoint, or of the one that its run began from; None if there was none.

    Raises:
        UserError: what is kept of it is damaged.
    """
    run_dir = checkpoint.parent.parent
    for _ in range(_DEEPEST):
        if (run_dir / FOLDER / _TENSORS).is_file():
            return _kept(run_dir / FOLDER)
        recipe_file = run_dir / "recipe.yaml"
        begun = load(str(recipe_file)).checkpoint.load if recipe_file.is_file() else None
        if begun is None:
            return None
        if begun.startswith(PREFIX):
            return _directory(Path(begun.removeprefix(PREFIX)))
        try:
            run_dir = resolve(Path(begun)).parent.parent
        except UserError:
            return None  # gone since
    return None


def _kept(folder: Path) -> Origin:
    file = folder / _TENSORS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        config = configs.read(folder)
        configs.model_of(config, str(folder / "config.json"))
        return Origin(folder, config, facts["main_dtype"], facts["mtp"], facts["exceptions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove {folder} to export without it") from None


def _directory(path: Path) -> Origin | None:
    from dsv3_train.checkpoint.hf.names import weights

    if not path.is_dir():
        return None  # gone since
    directory = open_directory(path)
    model = configs.model(directory.config, str(path / "config.json"))
    there = [weight for weight in weights(model, directory.mtp) if weight.name in directory.tensors]
    return Origin(path, directory.config, directory.main_dtype, directory.mtp, exceptions(directory, there))
