"""What a checkpoint keeps of the Hugging Face directory that it came from, so that it can go back as it was.

Beside the checkpoint, in `hf/`: the files that are no weights (config.json, licence, code, which is never run), the
index, facts of the tensors in `tensors.json`, and some of them by their bytes (kept.py). A run that begins from a
checkpoint or from a directory has a copy of its own. The tokenizer's files have a place of their own
(checkpoint/tokenizer_home.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, Field

from dsv3_train import regular
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import kept, language
from dsv3_train.checkpoint.hf.files import Stored, header_text, layout
from dsv3_train.checkpoint.hf.fp8 import Rule
from dsv3_train.checkpoint.hf.names import SCALE, Weight
from dsv3_train.checkpoint.hf.published import INDEX, Directory, absent_copies, open_directory, present, read_index
from dsv3_train.checkpoint.hf.scales import Looked
from dsv3_train.checkpoint.hf.sides import Published
from dsv3_train.data.special_tokens import FILES
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load
from dsv3_train.whole import sync, sync_below

FOLDER = "hf"
PREFIX = "hf:"
"""Of `checkpoint.load`: a Hugging Face directory."""
_TENSORS = "tensors.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_DEEPEST = 10  # runs that began from one another's checkpoints


_Type = Literal["F32", "BF16", "F8_E4M3"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Scales = tuple[_Positive, Optional[_Positive]]
"""Of a `fp8.Rule`."""


class _Rules(BaseModel):
    usual: Optional[_Scales]
    others: dict[str, Optional[_Scales]]


class _Facts(BaseModel):
    """tensors.json."""

    main_dtype: _Type
    mtp: int = Field(ge=0, le=100)
    exceptions: dict[str, _Type]
    prefix: Literal["", "language_model."] = ""
    beside: dict[str, str] = {}
    headers: dict[str, str] = {}
    nbytes: Optional[int] = None
    absent: list[str] = []
    rules: Optional[_Rules] = None


@dataclass(frozen=True)
class Origin:
    """A directory's configuration, other files, and how its tensors were stored."""

    folder: Path
    config: dict[str, Any]
    """Of the language model."""
    whole_config: dict[str, Any]
    main_dtype: str
    mtp: int
    """MTP modules that the files had."""
    kept: dict[str, Stored]
    """Tensors by their bytes, under their names in the files."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Types of the tensors whose type does not follow from `main_dtype`."""
    prefix: str = ""
    """Before the names of the model's tensors."""
    beside: dict[str, str] = field(default_factory=dict)
    """Tensors that are no weights of the model: name in the files -> what it is."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of files that are written otherwise than the safetensors library writes them: file -> its header."""
    nbytes: int | None = None
    """Of all tensors; None: not known of what earlier versions kept."""
    absent: frozenset[str] = frozenset()
    """MTP's copies that the files left out."""
    rules: dict[str, Rule | None] = field(default_factory=dict)
    """How FP8 weights had their scales; None: by no known rule."""

    def rule(self, name: str) -> Rule:
        """By which a trained weight gets its scales: its own, or the usual one where that is not known."""
        said = (self.config.get("quantization_config") or {}).get("scale_fmt")
        return self.rules.get(name) or Rule(mantissa=0.5 if said == "ue8m0" else None)

    @property
    def index(self) -> dict[str, Any] | None:
        """model.safetensors.index.json; None for one file without an index."""
        file = self.folder / INDEX
        return read_index(file) if os.path.lexists(file) else None


def usual_dtype(weight: Weight, main_dtype: str) -> str:
    """How a tensor is stored in files whose matrices are `main_dtype`."""
    if weight.stored == "fp32":
        return "F32"
    return "BF16" if main_dtype == "F8_E4M3" and weight.stored != "fp8" else main_dtype


def exceptions(directory: Directory, found: Iterable[Published]) -> dict[str, str]:
    """Types of tensors that are stored otherwise than usual."""
    main = directory.main_dtype
    return {one.weight.name: one.dtype for one in found if one.dtype != usual_dtype(one.weight, main)}


def _to_keep(directory: Directory, found: Iterable[Published]) -> dict[str, Stored]:
    tensors = {directory.published_name(one.weight.scale_name): one.scale for one in found if one.scale is not None}
    if directory.main_dtype != "F32":
        wide = [one for one in found if one.dtype == "F32" and one.weight.stored != "fp32"]
        tensors |= {directory.published_name(one.weight.name): one.stored for one in wide}
    return tensors | {directory.published_name(name): directory.tensors[name] for name in directory.beside}


def _nbytes(directory: Directory) -> int:
    return sum(tensor.nbytes for tensor in directory.tensors.values())


def _headers(directory: Directory) -> dict[str, str]:
    contents: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in directory.tensors.items():
        contents.setdefault(tensor.file, {})[directory.published_name(name)] = (tensor.dtype, tensor.shape)
    texts = {file: header_text(Path(file)) for file in contents}
    return {
        Path(file).name: text.decode()
        for file, text in texts.items()
        if layout(Path(file), contents[file]).header[8:] != text
    }


def keep(
    directory: Directory, found: list[Published], absent: list[str], looked: Mapping[str, Looked], to: Path
) -> None:
    """Write the folder `to`: everything of a directory but its weights, and what weights alone do not tell of it."""
    to.mkdir(exist_ok=True)
    copy_others(directory.path, to)
    if directory.weight_map is not None:
        (to / INDEX).write_bytes(regular.contents(directory.path / INDEX))
    kept.write(to, _to_keep(directory, found))
    rules = {name: one.rule for name, one in looked.items()}
    usual = Counter(rules.values()).most_common(1)[0][0] if rules else None
    facts = {
        "main_dtype": directory.main_dtype,
        "mtp": directory.mtp,
        "exceptions": exceptions(directory, found),
        "prefix": directory.prefix,
        "beside": {directory.published_name(name): kind for name, kind in directory.beside.items()},
        "headers": _headers(directory),
        "nbytes": _nbytes(directory),
        "absent": absent,
        "rules": {"usual": usual, "others": {name: rule for name, rule in rules.items() if rule != usual}},
    }
    (to / _TENSORS).write_text(json.dumps(facts), encoding="utf-8")


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


def others(source: Path) -> list[str]:
    """Names of what `copy_others` copies."""
    return [name for name, content in _others(source) if isinstance(content, bytes)]


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
        if os.path.lexists(run_dir / FOLDER):
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


def carry(begun: Path, run_dir: Path) -> None:
    """Give a run that begins from the checkpoint `begun` a copy of what that keeps, for the day when that is gone.

    What an earlier beginning left there goes.

    Raises:
        UserError: what is kept is damaged.
        OSError: the run directory cannot be written.
    """
    came_from = find(begun)
    if came_from is None or not os.path.lexists(came_from.folder / _TENSORS):  # or a directory's files as they are
        _refuse_foreign(run_dir / FOLDER)
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    elif came_from.folder.resolve() != (run_dir / FOLDER).resolve():
        with anew(run_dir) as folder:
            for file in came_from.folder.iterdir():
                if file.name == kept.FILE:  # gigabytes, and never written again
                    with contextlib.suppress(OSError):
                        os.link(file, folder / file.name)
                        continue
                shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def anew(run_dir: Path) -> Iterator[Path]:
    """A folder that becomes a run's `hf/` when it is whole, in the place of another."""
    _refuse_foreign(run_dir / FOLDER)
    folder = run_dir / f"{FOLDER}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    sync_below(folder)
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    folder.rename(run_dir / FOLDER)
    sync(run_dir)


def _refuse_foreign(folder: Path) -> None:
    """Refuse to delete a run's `hf/` that is none of ours: what is kept has `tensors.json`.

    Raises:
        UserError: names it.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / _TENSORS).is_file()):
        raise UserError(f"{folder}: is in the way, and not what a conversion has kept; move it away")


def _kept(folder: Path) -> Origin:
    file = folder / _TENSORS
    try:
        facts = _Facts.model_validate(json.loads(regular.read(file).decode("utf-8")))
        whole = configs.read(folder)
        config = language.part(whole)
        configs.model_of(whole, str(folder / "config.json"))
        # Earlier versions kept no tensors, and knew no rules.
        tensors = kept.read(folder) if facts.rules else {}
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{file}: damaged ({said}); remove {folder} to export without it") from None
    names = [name for name in tensors if name.endswith(SCALE)]
    usual, others = (facts.rules.usual, facts.rules.others) if facts.rules else (None, {})
    rules = {name.removeprefix(facts.prefix).removesuffix(SCALE): usual for name in names}
    return Origin(
        folder,
        config,
        whole,
        facts.main_dtype,
        facts.mtp,
        tensors,
        dict(facts.exceptions),
        facts.prefix,
        facts.beside,
        facts.headers,
        facts.nbytes,
        frozenset(facts.absent),
        {name: Rule(*rule) if rule else None for name, rule in (rules | others).items()},
    )


def _directory(path: Path) -> Origin | None:
    """Of a run that began from a directory before runs kept anything of it."""
    if not path.is_dir():
        return None  # gone since
    directory = open_directory(path)
    model = configs.model(directory.config, str(path / "config.json"))
    found = present(directory, model, directory.mtp)
    return Origin(
        path,
        directory.config,
        configs.read(path),
        directory.main_dtype,
        directory.mtp,
        _to_keep(directory, found),
        exceptions(directory, found),
        directory.prefix,
        {directory.published_name(name): kind for name, kind in directory.beside.items()},
        _headers(directory),
        _nbytes(directory),
        frozenset(absent_copies(directory, model, directory.mtp)),
    )
