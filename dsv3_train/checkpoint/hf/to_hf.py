"""`dsv3 convert to-hf`: a sharded checkpoint into a directory as Hugging Face's libraries write and read it."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3_train import regular
from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf import fp8, origin, work
from dsv3_train.checkpoint.hf.files import DTYPES, Layout, Stored, itemsize, layout, write_at
from dsv3_train.checkpoint.hf.names import BLOCK, SCALE
from dsv3_train.checkpoint.hf.origin import Origin
from dsv3_train.checkpoint.hf.published import INDEX, SINGLE
from dsv3_train.checkpoint.hf.run import checkpoint_side, recipe_beside
from dsv3_train.checkpoint.hf.sides import Sharded, accelerator, blocks
from dsv3_train.checkpoint.hf.work import Progress, Unit
from dsv3_train.checkpoint.tokenizer_home import Home
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe

Dtype = Literal["bf16", "fp8", "fp32"]
Mtp = Literal["keep", "drop"]
MAIN: dict[Dtype, str] = {"bf16": "BF16", "fp8": "F8_E4M3", "fp32": "F32"}
"""Type of matrices for each value of `--dtype`."""
_CHOICE: dict[str, Dtype] = {"BF16": "bf16", "F8_E4M3": "fp8", "F32": "fp32"}
_LARGEST_FILE = 5_000_000_000  # bytes of tensors, as transformers cut files up to its version 4


@dataclass(frozen=True)
class Output:
    """A tensor to be written in `dtype`, and its FP8 scales' powers of two."""

    source: Sharded
    dtype: str
    powers_of_two: bool


@dataclass(frozen=True)
class Plan:
    """What an export will write."""

    checkpoint: Path
    recipe: Recipe
    dtype: Dtype
    mtp: int
    outputs: dict[str, Output]
    """By name of the weight."""
    weight_map: dict[str, str]
    """Tensor (weight or scales) -> file."""
    index: dict[str, Any] | None
    config: dict[str, Any]
    verbatim: bool
    """config.json is the origin's, byte for byte."""
    origin: Origin | None
    tokenizer: Home | None
    notes: list[str]

    def contents(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Types and shapes of a file's tensors."""
        return {name: _described(self.outputs, name) for name, where in self.weight_map.items() if where == file}

    def report(self) -> dict[str, Any]:
        """Counts, for `--json`."""
        described = [_described(self.outputs, name) for name in self.weight_map]
        return {
            "source": str(self.checkpoint),
            "weights": len(self.outputs),
            "scales": len(self.weight_map) - len(self.outputs),
            "values": sum(output.source.weight.values for output in self.outputs.values()),
            "dtypes": dict(Counter(dtype for dtype, _ in described)),
            "dtype": self.dtype,
            "mtp": self.mtp,
            "bytes": sum(map(_nbytes, described)),
            "files": len(set(self.weight_map.values())),
            "memory_per_worker": work.WORKER_BYTES,
            "notes": self.notes,
        }


def make_plan(checkpoint: Path, dtype: Dtype | None, mtp: Mtp | None) -> Plan:
    """Look at everything that can be wrong before anything is written.

    Raises:
        UserError: checkpoint, its recipe or the options are at fault.
    """
    recipe = recipe_beside(checkpoint)
    configs.refuse_unwritable(recipe.model, str(checkpoint.parent.parent / "recipe.yaml"))
    came_from = origin.find(checkpoint)
    notes = [] if came_from else ["no Hugging Face directory is known that this came from: config.json is made anew"]
    side = checkpoint_side(checkpoint, recipe)
    modules = recipe.model.num_nextn_predict_layers
    if mtp == "keep" and not modules:
        raise UserError(f"{checkpoint}: no MTP to keep; leave --mtp out, or say --mtp drop")
    if mtp == "drop" and modules:
        side = checkpoint_side(checkpoint, recipe, mtp=0)
        modules = 0
    main = came_from.main_dtype if came_from else MAIN[recipe.precision.params]
    chosen: Dtype = dtype if dtype is not None else _CHOICE[main]
    powers_of_two = _scale_format(came_from) == "ue8m0"
    outputs = {one.weight.name: Output(one, _dtype(one, chosen, came_from), powers_of_two) for one in side}
    names = [tensor for output in outputs.values() for tensor in _tensors(output)]
    weight_map, index = _placed(names, outputs, came_from)
    notes += origin.left_out(came_from.folder) if came_from else []
    tokenizer = tokenizer_home.find(checkpoint.parent.parent, recipe)
    if tokenizer:
        tokenizer_home.refuse_other(tokenizer_home.recorded(checkpoint), tokenizer.sha256, checkpoint)
    tokens = {} if came_from else _tokens(tokenizer, notes)
    config, verbatim = _config(recipe, chosen, modules, came_from, tokens)
    return Plan(
        checkpoint,
        recipe,
        chosen,
        modules,
        outputs,
        weight_map,
        index,
        config,
        verbatim,
        came_from,
        tokenizer,
        notes,
    )


def _tokens(tokenizer: Home | None, notes: list[str]) -> dict[str, int]:
    """config.json's ids of the tokens that begin and end a text and fill a batch, as far as they are known; else a
    note."""
    without = "config.json has no eos_token_id and bos_token_id, for which transformers takes 1 and 0"
    if tokenizer is None or tokenizer.sha256 is None:
        notes.append(f"no tokenizer is known: none was written, and {without}")
        return {}
    try:
        tokens = {f"{role}_token_id": tokenizer.tokenizer.special(role) for role in ("bos", "eos", "pad")}
    except UserError as error:
        notes.append(f"{error}; {without}")
        return {}
    if tokens["bos_token_id"] != tokens["eos_token_id"]:
        begin = tokenizer.tokenizer.spelling("bos")
        notes.append(f"by the tokenizer's configuration a text begins with {begin}, which no document of our data does")
    return tokens


def _scale_format(came_from: Origin | None) -> str | None:
    return ((came_from.config.get("quantization_config") or {}) if came_from else {}).get("scale_fmt")


def _dtype(one: Sharded, dtype: Dtype, came_from: Origin | None) -> str:
    """As usual for `dtype`; what the origin stored otherwise stays so, unless everything is to be FP32."""
    weight, usual = one.weight, origin.usual_dtype(one.weight, MAIN[dtype])
    if came_from is None or dtype == "fp32" or weight.name not in came_from.exceptions:
        return usual
    kept, same = came_from.exceptions[weight.name], came_from.main_dtype == MAIN[dtype]
    if weight.stored == "fp32":
        # A routing bias that came in BF16 goes back so while training has not changed it, and in FP32 from then on.
        bias = one.rows(0, weight.shape[0]).float()
        return kept if same and torch.equal(bias.to(DTYPES[kept]).float(), bias) else usual
    return kept if same or (kept == "F32" != came_from.main_dtype) else usual


def _tensors(output: Output) -> list[str]:
    weight = output.source.weight
    return [weight.name, weight.scale_name] if output.dtype == "F8_E4M3" else [weight.name]


def _described(outputs: dict[str, Output], name: str) -> tuple[str, tuple[int, ...]]:
    output = outputs.get(name)
    if output is not None:
        return output.dtype, output.source.weight.shape
    return "F32", outputs[_scaled(name)].source.weight.scale_shape


def _scaled(name: str) -> str:
    """The weight that a tensor is, or holds the scales of."""
    return name.removesuffix(SCALE)


def _nbytes(described: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = described
    return prod(shape) * itemsize(dtype)


def _placed(
    names: list[str], outputs: dict[str, Output], came_from: Origin | None
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Each tensor's file, and the index: the origin's where it has the same tensors, else in order."""
    total = sum(_nbytes(_described(outputs, name)) for name in names)
    index = came_from.index if came_from else None
    if index is not None and set(index["weight_map"]) == set(names):
        weight_map = {name: index["weight_map"][name] for name in names}
        metadata = {**index.get("metadata", {}), "total_size": total}
        return weight_map, {**index, "metadata": metadata}
    groups: list[list[str]] = []
    size = _LARGEST_FILE
    for name in names:
        nbytes = _nbytes(_described(outputs, name))
        if size + nbytes > _LARGEST_FILE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return dict.fromkeys(names, SINGLE), None
    weight_map = {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }
    return weight_map, {"metadata": {"total_size": total}, "weight_map": weight_map}


def _config(
    recipe: Recipe, dtype: Dtype, mtp: int, came_from: Origin | None, tokens: dict[str, int]
) -> tuple[dict[str, Any], bool]:
    """config.json, and whether it is the origin's as it stands."""
    if came_from is None:
        fresh = configs.config_of(recipe.model, mtp, recipe.training.sequence_length, tokens.get("eos_token_id"))
        return configs.with_dtype(fresh | tokens, dtype), False
    config = dict(came_from.config)
    same = came_from.main_dtype == MAIN[dtype] and came_from.mtp == mtp
    stale = configs.contradictions(recipe, config, recipe.model.num_nextn_predict_layers)
    if same and not stale and bool(config.get("quantization_config")) == (dtype == "fp8"):
        return config, True
    if came_from.mtp != mtp:
        config["num_nextn_predict_layers"] = mtp
    if stale:
        config |= configs.changed(recipe.model, config)
    return configs.with_dtype(config, dtype), False


def convert(plan: Plan, target: Path, workers: int | None, progress: Progress) -> dict[str, Any]:
    """Write TARGET: safetensors files, index, config.json, tokenizer; whole or not at all.

    Peak memory is `work.WORKER_BYTES` for each of at most `work.MOST_WORKERS` workers, whatever the model's size.

    Raises:
        UserError: the checkpoint is damaged, the disk is full, or TARGET cannot be written.
    """
    files = sorted(set(plan.weight_map.values()))
    units = []
    for number, file in enumerate(files):
        contents = plan.contents(file)
        outputs = {_scaled(name): plan.outputs[_scaled(name)] for name in contents}
        units.append(Unit(number, sum(map(_nbytes, contents.values())), (file, contents, outputs)))
    total = sum(unit.nbytes for unit in units)
    changed = (plan.checkpoint / ".metadata").stat().st_mtime_ns
    fingerprint = [str(plan.checkpoint), changed, plan.dtype, plan.mtp, plan.weight_map]
    with work.unfinished(target, fingerprint) as where:
        work.run(where, write_file, units, work.worker_count(workers, total), progress, "converting")
        _write_others(plan, where)
    return {**plan.report(), "target": str(target)}


def _write_others(plan: Plan, where: Path) -> None:
    if plan.origin is not None:
        origin.copy_others(plan.origin.folder, where)
    if plan.tokenizer is not None:
        plan.tokenizer.write(where)
    if not plan.verbatim:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        (where / "config.json").write_text(text, encoding="utf-8")
    if plan.index is None:
        return
    if plan.origin is not None and plan.index == plan.origin.index:
        (where / INDEX).write_bytes(regular.contents(plan.origin.folder / INDEX))
    else:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (where / INDEX).write_text(text, encoding="utf-8")


def write_file(
    where: str, name: str, contents: dict[str, tuple[str, tuple[int, ...]]], outputs: dict[str, Output]
) -> int:
    """Write one safetensors file under another name, then give it its own; its size in bytes."""
    torch.set_num_threads(1)
    final = Path(where, name)
    plan = layout(final, contents)
    unfinished = final.with_name(name + ".part")
    with unfinished.open("wb", buffering=0) as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, plan.header, 0)
        for output in outputs.values():
            _write(descriptor, output, plan)
        os.fsync(descriptor)
    os.replace(unfinished, final)
    return plan.size


def _write(descriptor: int, output: Output, plan: Layout) -> None:
    weight = output.source.weight
    values, scales = plan.tensors.get(weight.name), plan.tensors.get(weight.scale_name)
    for first, last in blocks(weight):
        rows = output.source.rows(first, last)
        if output.dtype != "F8_E4M3":
            write_at(descriptor, rows.to(DTYPES[output.dtype]), _row(values, first))
            continue
        codes, scale = fp8.quantise(rows.to(accelerator()).float(), output.powers_of_two)
        # The scales may lie in another file than the codes.
        if values is not None:
            write_at(descriptor, codes.cpu(), _row(values, first))
        if scales is not None:
            write_at(descriptor, scale.cpu(), _row(scales, first // BLOCK))


def _row(stored: Stored | None, row: int) -> int:
    """The byte at which a row begins."""
    assert stored is not None
    return stored.begin + row * (stored.nbytes // stored.shape[0])
