"""A Hugging Face directory: which tensors its files hold, and whether they are those of the model."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_train import regular
from dsv3_train.checkpoint.hf import beside, formats, language
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf.files import Stored, read_header
from dsv3_train.checkpoint.hf.names import SCALE, Weight, refuse_more, weights
from dsv3_train.checkpoint.hf.sides import Published
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READ = ("F32", "BF16", "F8_E4M3")
LARGEST_JSON = 32 << 20
"""Bytes; the index of Kimi-K2's 140,000 tensors has 13 million."""
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Directory:
    """What is in a directory, read from its headers alone."""

    path: Path
    config: dict[str, Any]
    """Of the language model, where config.json speaks of others too."""
    tensors: dict[str, Stored]
    """Weights and scales, by name, without `prefix`."""
    prefix: str
    """What the files put before the names of a language model's tensors: empty where there is no other model."""
    weight_map: dict[str, str] | None
    """The index: tensor -> file. None: one file without an index."""
    problems: list[str] = field(default_factory=list)
    """Of files and index, one line each."""

    @property
    def main_dtype(self) -> str:
        """F8_E4M3 if any weight is, else the type that most values of matrices have."""
        matrices = Counter[str]()
        for name, tensor in self.tensors.items():
            if len(tensor.shape) > 1 and not name.endswith(SCALE) and name not in self.beside:
                matrices[tensor.dtype] += tensor.nbytes
        return "F8_E4M3" if "F8_E4M3" in matrices else max(matrices, key=lambda dtype: matrices[dtype], default="BF16")

    @functools.cached_property
    def beside(self) -> dict[str, str]:
        """Tensors that are known to be no weights of the model: name -> what it is (beside.py)."""
        layers = int(configs.settings(self.config)["num_hidden_layers"])
        return beside.found(self.tensors, layers, self.declared_mtp, bool(self.prefix))

    @property
    def mtp_names(self) -> list[str]:
        """Tensors of MTP modules: of the layers that config.json counts beyond the main model's."""
        first = int(configs.settings(self.config)["num_hidden_layers"])
        beyond = range(first, first + self.declared_mtp)
        return [name for name in self.tensors if (match := beside.LAYER.match(name)) and int(match[1]) in beyond]

    @property
    def declared_mtp(self) -> int:
        """MTP modules by config.json or its class; transformers leaves their tensors out and the number in."""
        return int(configs.settings(self.config)["num_nextn_predict_layers"])

    @property
    def mtp(self) -> int:
        """MTP modules by config.json if the files have anything of them, else 0."""
        return self.declared_mtp if self.mtp_names else 0

    def published_name(self, name: str) -> str:
        """A tensor's name in the files."""
        return name if self.beside.get(name) == beside.VISION else self.prefix + name

    def check_files(self) -> None:
        """Refuse a directory whose files are damaged or missing.

        Raises:
            UserError: the first problem, and how many more there are.
        """
        if self.problems:
            raise UserError(_first(self.problems))


def open_directory(path: Path) -> Directory:
    """Look into a directory; damage of single files is kept in `problems`.

    Raises:
        UserError: not a Hugging Face directory of a model that is supported.
    """
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; give one with config.json and .safetensors files")
    whole = configs.read(path)
    config = language.part(whole)
    formats.refuse_named(path, whole, config)
    configs.model_of(whole, str(path / "config.json"))
    weight_map = _weight_map(path)
    problems: list[str] = []
    tensors: dict[str, Stored] = {}
    listed: dict[str, list[str]] = {}
    for tensor, name in weight_map.items() if weight_map is not None else [("", SINGLE)]:
        listed.setdefault(name, []).append(tensor)
    for name in sorted(listed):
        file = path / name
        try:
            header = read_header(file)
        except FileNotFoundError:
            problems.append(f"{file}: missing; the index names it for {len(listed[name])} tensors; fetch it again")
            continue
        except OSError as error:
            problems.append(f"{file}: {error.strerror}; fetch it again")
            continue
        except UserError as error:
            problems.append(str(error))
            continue
        twice = header.keys() & tensors.keys()
        problems += [f"{file}: {one} is in another file too; remove one of the two" for one in sorted(twice)]
        tensors |= header
        lacking = [one for one in listed[name] if one and one not in header]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            problems.append(f"{file}: lacks {lacking[0]}{more}, which the index says is there; fetch it again")
    formats.refuse_tensors(path, tensors)
    prefix = language.prefix(whole, tensors)
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    problems += [
        f"{tensor.file}: {name} is there with and without {prefix}; remove one of the two"
        for name, tensor in plain.items()
        if prefix and {name, prefix + name} <= tensors.keys()
    ]
    return Directory(path, config, plain, prefix, weight_map, problems)


def _weight_map(path: Path) -> dict[str, str] | None:
    file = path / INDEX
    if not os.path.lexists(file):
        if os.path.lexists(path / SINGLE):
            return None
        hint = "; this reads safetensors only, pickled .bin files can run code" if any(path.glob("*.bin")) else ""
        raise UserError(f"{path}: neither {INDEX} nor {SINGLE}{hint}")
    return read_index(file)["weight_map"]


def read_index(file: Path) -> dict[str, Any]:
    """An index of safetensors files, whose `weight_map` names files of the same directory.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        index = json.loads(regular.read(file, LARGEST_JSON).decode("utf-8"))
        names = set(index["weight_map"].values())
        if not isinstance(index.get("metadata"), (dict, type(None))):
            raise ValueError("metadata is no object")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; fetch it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: no index of safetensors files ({error}); fetch it again") from None
    strange = sorted(str(name) for name in names if not _is_name(name))
    if strange:
        raise UserError(f"{file}: names {strange[0]!r}, which is no safetensors file of this directory")
    return index


def _is_name(name: Any) -> bool:
    """Whether it is a safetensors file's in this directory."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def differences(directory: Directory, model: Model, mtp: int) -> tuple[list[str], list[str]]:
    """(missing, surplus): tensors that the model has and the files lack, and the other way round, scales included.

    A scale is wanted where its weight is stored in FP8, MTP's copies of embedding and head only without the original.
    With `mtp` 0, MTP's tensors are no surplus, nor is what is known to be beside a model.
    """
    expected = _weights(directory, model, mtp)
    wanted = {weight.name for weight in expected}
    dropped = set() if mtp else set(directory.mtp_names)
    tensors = directory.tensors
    for weight in expected:
        stored = tensors.get(weight.name)
        if stored is not None and stored.dtype.startswith("F8"):
            wanted.add(weight.scale_name)
    missing = wanted - tensors.keys() - set(absent_copies(directory, model, mtp))
    surplus = tensors.keys() - wanted - dropped - directory.beside.keys()
    return sorted(missing), sorted(surplus)


def absent_copies(directory: Directory, model: Model, mtp: int) -> list[str]:
    """MTP's copies of embedding and head that the files leave out, because they have the original."""
    expected = _weights(directory, model, mtp)
    originals = {weight.key: weight.name for weight in expected if not weight.copy}
    return [
        weight.name
        for weight in expected
        if weight.copy and weight.name not in directory.tensors and originals[weight.key] in directory.tensors
    ]


def find(directory: Directory, model: Model, mtp: int) -> list[Published]:
    """Every tensor of the model in the files, each with the right shape and type and none left over.

    Raises:
        UserError: the first thing that is wrong, and how many more there are.
    """
    directory.check_files()
    missing, surplus = differences(directory, model, mtp)
    path = directory.path
    faults = [
        f"{path}: {name} is missing"
        + (", the scales of an FP8 weight" if name.endswith(SCALE) else "")
        + "; fetch the files again, or correct config.json"
        for name in missing
    ]
    faults += [f"{path}: {name} is no tensor of this model; remove it, or correct config.json" for name in surplus]
    faults += wrong(directory, model, mtp)
    if faults:
        raise UserError(_first(faults))
    return present(directory, model, mtp)


def present(directory: Directory, model: Model, mtp: int) -> list[Published]:
    """The tensors of the model that the files have."""
    tensors = directory.tensors
    return [
        Published(weight, tensors[weight.name], tensors.get(weight.scale_name))
        for weight in _weights(directory, model, mtp)
        if weight.name in tensors
    ]


def _weights(directory: Directory, model: Model, mtp: int) -> tuple[Weight, ...]:
    refuse_more(model, mtp, len(directory.tensors), str(directory.path / "config.json"))
    return weights(model, mtp)


def wrong(directory: Directory, model: Model, mtp: int) -> list[str]:
    """What is wrong with the shapes and types of the tensors that are there, one line each."""
    return [
        fault for found in present(directory, model, mtp) for fault in _unreadable(found) or _rounded(directory, found)
    ]


def readable(directory: Directory, model: Model, mtp: int) -> list[Published]:
    """The tensors of the model that the files have, whether all or not, each of a shape and type that can be read.

    Raises:
        UserError: the first that is not, or whose scales are missing, and how many more there are.
    """
    directory.check_files()
    found = present(directory, model, mtp)
    faults = [fault for one in found for fault in _unreadable(one)]
    faults += [
        f"{one.stored.file}: {one.weight.scale_name} is missing, the scales of an FP8 weight; fetch the files again"
        for one in found
        if one.stored.dtype == "F8_E4M3" and one.scale is None
    ]
    if faults:
        raise UserError(_first(faults))
    return found


def _unreadable(found: Published) -> list[str]:
    weight, stored, scale = found.weight, found.stored, found.scale
    place = f"{stored.file}: {weight.name}"
    if stored.shape != weight.shape:
        return [f"{place} is {list(stored.shape)}, and config.json makes it {list(weight.shape)}"]
    if stored.dtype not in _READ:
        return [f"{place} is {stored.dtype}; weights are read in {', '.join(_READ)}"]
    if stored.dtype == "F8_E4M3":
        if weight.stored != "fp8":
            return [f"{place} is FP8, in which only the linear layers of attention and FFN are stored"]
        if scale is not None and (scale.shape, scale.dtype) != (weight.scale_shape, "F32"):
            expected = f"F32 {list(weight.scale_shape)}"
            return [f"{scale.file}: {weight.scale_name} is {scale.dtype} {list(scale.shape)}, not {expected}"]
    return []


def _rounded(directory: Directory, found: Published) -> list[str]:
    weight, stored = found.weight, found.stored
    if weight.stored == "fp32" and stored.dtype != "F32":
        # A directory saved in one type has its routing biases in it too; anywhere else they have lost bits.
        types = {tensor.dtype for name, tensor in directory.tensors.items() if name not in directory.beside}
        place = f"{stored.file}: {weight.name}"
        return [f"{place} is {stored.dtype}, not F32; rounded routing biases choose other experts"] * (len(types) > 1)
    return []


def _first(faults: list[str]) -> str:
    return faults[0] + (f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else "")
