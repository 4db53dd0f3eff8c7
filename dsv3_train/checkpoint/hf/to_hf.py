"""`dsv3 convert to-hf`: a sharded checkpoint into a directory as Hugging Face's libraries write and read it."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3_train import regular, whole
from dsv3_train.checkpoint import tokenizer_home
from dsv3_train.checkpoint.hf import beside, checks, config_out, fp8, kept, language, origin, work
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf.files import DTYPES, Layout, Stored, itemsize, layout, write_at
from dsv3_train.checkpoint.hf.names import BLOCK, SCALE
from dsv3_train.checkpoint.hf.origin import Origin
from dsv3_train.checkpoint.hf.published import INDEX, SINGLE
from dsv3_train.checkpoint.hf.run import checkpoint_side, recipe_beside
from dsv3_train.checkpoint.hf.sharded import open_checkpoint
from dsv3_train.checkpoint.hf.sides import Sharded, accelerator, blocks
from dsv3_train.checkpoint.hf.work import Progress, Unit
from dsv3_train.checkpoint.tokenizer_home import Home
from dsv3_train.data.special_tokens import FILES
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe

Dtype = Literal["bf16", "fp8", "fp32"]
Mtp = Literal["keep", "drop"]
MAIN: dict[Dtype, str] = {"bf16": "BF16", "fp8": "F8_E4M3", "fp32": "F32"}
"""Type of matrices for each value of `--dtype`."""
_CHOICE: dict[str, Dtype] = {"BF16": "bf16", "F8_E4M3": "fp8", "F32": "fp32"}
_LARGEST_FILE = 5_000_000_000  # bytes of tensors, as transformers cut files up to its version 4


Described = tuple[str, tuple[int, ...]]
"""A tensor's type and shape."""


@dataclass(frozen=True)
class Output:
    """A tensor to be written in `dtype`."""

    source: Sharded
    """Under its name in the files."""
    dtype: str
    rule: fp8.Rule
    """For FP8 scales of what training has changed."""
    scales: Stored | None
    """FP8 scales that it came with."""
    wide: Stored | None
    """Its FP32 values as it came, which training in BF16 has rounded where it has not changed them."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """To be written: as it came where it is that rounded, else as in the checkpoint."""
        rows = self.source.rows(first, last)
        if self.wide is None or rows.dtype == torch.float32:
            return rows
        came = self.wide.read(first, last)
        return torch.where(came.to(rows.dtype) == rows, came, rows.float())


@dataclass(frozen=True)
class Plan:
    """What an export will write."""

    checkpoint: Path
    recipe: Recipe
    dtype: Dtype
    mtp: int
    outputs: dict[str, Output]
    """By name of the weight."""
    beside: dict[str, Stored]
    """Tensors that are no weights of the model, to be copied."""
    described: dict[str, Described]
    """Every tensor: weights, scales, and what is beside them."""
    weight_map: dict[str, str]
    """Tensor (weight or scales) -> file."""
    index: dict[str, Any] | None
    config: dict[str, Any]
    verbatim: bool
    """config.json is the origin's, byte for byte."""
    origin: Origin | None
    tokenizer: Home | None
    notes: list[str]

    def contents(self, file: str) -> dict[str, Described]:
        """Types and shapes of a file's tensors."""
        return {name: self.described[name] for name, where in self.weight_map.items() if where == file}

    def report(self) -> dict[str, Any]:
        """Counts, for `--json`."""
        described = list(self.described.values())
        return {
            "source": str(self.checkpoint),
            "weights": len(self.outputs),
            "scales": len(self.described) - len(self.outputs) - len(self.beside),
            "beside": len(self.beside),
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
    config_out.refuse_unwritable(recipe.model, str(checkpoint.parent.parent / "recipe.yaml"))
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
    absent = came_from.absent if came_from else frozenset()
    made = [_output(one, chosen, came_from) for one in side if one.weight.name not in absent]
    outputs = {output.source.weight.name: output for output in made}
    others = _beside(came_from, mtp)
    described = {name: tensor for output in made for name, tensor in _tensors(output).items()}
    described |= {name: (stored.dtype, stored.shape) for name, stored in others.items()}
    weight_map, index = _placed(described, came_from, came_from is not None and came_from.main_dtype == MAIN[chosen])
    notes += origin.left_out(came_from.folder) if came_from else []
    tokenizer = tokenizer_home.find(checkpoint.parent.parent, recipe)
    if tokenizer:
        tokenizer_home.refuse_other(tokenizer_home.recorded(checkpoint), tokenizer.sha256, checkpoint)
    tokens = {} if came_from else _tokens(tokenizer, notes)
    config, verbatim = _config(recipe, chosen, modules, came_from, tokens)
    notes += configs.notes(config) + checks.told(open_checkpoint(checkpoint))
    return Plan(
        checkpoint,
        recipe,
        chosen,
        modules,
        outputs,
        others,
        described,
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
    without = "config.json has no bos_token_id and eos_token_id, and transformers assumes 0 and 1"
    if tokenizer is None or tokenizer.sha256 is None:
        notes.append(f"no tokenizer is known, so none was written; {without}")
        return {}
    try:
        tokens = {f"{role}_token_id": tokenizer.tokenizer.special(role) for role in ("bos", "eos", "pad")}
    except UserError as error:
        notes.append(f"{error}; {without}")
        return {}
    if tokens["bos_token_id"] != tokens["eos_token_id"]:
        begin = tokenizer.tokenizer.spelling("bos")
        notes.append(
            f"the tokenizer's configuration begins a text with {begin}; documents that `dsv3 data prepare` made do not"
        )
    return tokens


def _output(one: Sharded, chosen: Dtype, came_from: Origin | None) -> Output:
    dtype = _dtype(one, chosen, came_from)
    if came_from is None:
        return Output(one, dtype, fp8.USUAL, None, None)
    named = replace(one, weight=replace(one.weight, name=came_from.prefix + one.weight.name))
    scales = came_from.kept.get(named.weight.scale_name) if dtype == "F8_E4M3" else None
    wide = came_from.kept.get(named.weight.name) if dtype == "F32" else None
    for stored, shape in ((scales, one.weight.scale_shape), (wide, one.weight.shape)):
        if stored is not None and (stored.dtype, stored.shape) != ("F32", shape):
            raise UserError(
                f"{stored.file}: what is kept of {one.weight.name} is {stored.dtype} {list(stored.shape)}, not F32 "
                f"{list(shape)}: another model's; remove {came_from.folder} to export without it"
            )
    return Output(named, dtype, came_from.rule(one.weight.name), scales, wide)


def _beside(came_from: Origin | None, mtp: Mtp | None) -> dict[str, Stored]:
    """What came beside the model's weights and goes back with them; MTP that was not counted unless it is to go."""
    if came_from is None:
        return {}
    names = [name for name, kind in came_from.beside.items() if mtp != "drop" or kind != beside.MTP]
    lacking = [name for name in names if name not in came_from.kept]
    if lacking:
        raise UserError(
            f"{came_from.folder / kept.FILE}: lacks {lacking[0]}, which tensors.json says is kept; put the file back, "
            f"or remove {came_from.folder} to export without it"
        )
    return {name: came_from.kept[name] for name in names}


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


def _tensors(output: Output) -> dict[str, Described]:
    weight = output.source.weight
    tensors: dict[str, Described] = {weight.name: (output.dtype, weight.shape)}
    if output.dtype == "F8_E4M3":
        tensors[weight.scale_name] = ("F32", weight.scale_shape)
    return tensors


def _nbytes(described: Described) -> int:
    dtype, shape = described
    return prod(shape) * itemsize(dtype)


def _placed(
    described: dict[str, Described], came_from: Origin | None, same_type: bool
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Each tensor's file, and the index: the origin's where it has the same tensors, else in order."""
    total = sum(map(_nbytes, described.values()))
    index = came_from.index if came_from else None
    if index is not None and set(index["weight_map"]) == set(described):
        weight_map = {name: index["weight_map"][name] for name in described}
        if came_from is not None and came_from.nbytes == total:
            return weight_map, index  # whatever it says of sizes, or nothing
        metadata = {**(index.get("metadata") or {}), "total_size": total}
        return weight_map, {**index, "metadata": metadata}
    groups: list[list[str]] = []
    size = _LARGEST_FILE
    for name, tensor in described.items():
        nbytes = _nbytes(tensor)
        if size + nbytes > _LARGEST_FILE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1 or (same_type and index is None):  # as large as it may be, it came in one file
        return dict.fromkeys(described, SINGLE), None
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
        fresh = config_out.config_of(recipe.model, mtp, recipe.training.sequence_length, tokens.get("eos_token_id"))
        return config_out.with_dtype(fresh | tokens, dtype), False
    config = came_from.config
    same = came_from.main_dtype == MAIN[dtype] and came_from.mtp == mtp
    stale = configs.contradictions(recipe, config, recipe.model.num_nextn_predict_layers)
    quantised = bool(configs.settings(config).get("quantization_config"))
    if same and not stale and quantised == (dtype == "fp8"):
        return config, True
    return config_out.updated(config, recipe.model, mtp if came_from.mtp != mtp else None, dtype), False


def convert(plan: Plan, target: Path, workers: int | None, progress: Progress) -> dict[str, Any]:
    """Write TARGET: safetensors files, index, config.json, tokenizer; whole or not at all.

    Peak memory is `work.WORKER_BYTES` for each of at most `work.MOST_WORKERS` workers, whatever the model's size.

    Raises:
        UserError: the checkpoint is damaged, the disk is full, or TARGET cannot be written.
    """
    files = sorted(set(plan.weight_map.values()))
    units = _units(plan, files)
    total = sum(unit.nbytes for unit in units)
    known = checks.of(open_checkpoint(plan.checkpoint))
    files_of_it = [plan.checkpoint / ".metadata", *(Path(file) for file, *_ in known)]
    changed = [known, [file.stat().st_mtime_ns for file in files_of_it]]
    fingerprint = ["with checksums", str(plan.checkpoint), changed, plan.dtype, plan.mtp, plan.weight_map]
    copied = set(origin.others(plan.origin.folder)) if plan.origin else set()
    ours = {*files, *(f"{file}.part" for file in files), *copied, "config.json", INDEX}
    ours |= {name + ending for name in FILES for ending in ("", ".unfinished")}
    with work.unfinished(target, fingerprint, ours.__contains__) as where:
        work.run(where, units, work.worker_count(workers, total), progress, "converting")
        _write_others(plan, where)
    return {**plan.report(), "target": str(target)}


def _units(plan: Plan, files: list[str]) -> list[Unit]:
    """The files to write, and before each the files of the checkpoint that it is the first to read, to check."""
    headers = plan.origin.headers if plan.origin else {}
    contents = [plan.contents(file) for file in files]
    outputs = [
        [plan.outputs[name] for name in dict.fromkeys(x.removesuffix(SCALE) for x in of_file if x not in plan.beside)]
        for of_file in contents
    ]
    first = checks.in_turn([[output.source for output in of_file] for of_file in outputs])
    units: list[Unit] = []
    for file, of_file, written, to_check in zip(files, contents, outputs, first, strict=True):
        units += [Unit(len(units) + i, 0, checks.check, one, reads=one[1]) for i, one in enumerate(to_check)]
        others = {name: plan.beside[name] for name in of_file if name in plan.beside}
        task = file, of_file, written, others, headers.get(file)
        units.append(Unit(len(units), sum(map(_nbytes, of_file.values())), write_file, task))
    return units


def _write_others(plan: Plan, where: Path) -> None:
    if plan.origin is not None:
        origin.copy_others(plan.origin.folder, where)
    if plan.tokenizer is not None:
        plan.tokenizer.write(where)
    if not plan.verbatim:
        config = language.whole(plan.origin.whole_config, plan.config) if plan.origin else plan.config
        try:
            text = json.dumps(config, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON has in ASCII alone
            text = json.dumps(config, indent=2).encode()
        (where / "config.json").write_bytes(text + b"\n")
    if plan.index is None:
        return
    if plan.origin is not None and plan.index == plan.origin.index:
        (where / INDEX).write_bytes(regular.contents(plan.origin.folder / INDEX))
    else:
        index = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (where / INDEX).write_text(index, encoding="utf-8")


def write_file(
    where: str,
    name: str,
    contents: dict[str, Described],
    outputs: list[Output],
    others: dict[str, Stored],
    header: str | None,
) -> int:
    """Write one safetensors file under another name, then give it its own; its size in bytes."""
    torch.set_num_threads(1)
    final = Path(where, name)
    plan = layout(final, contents, header)
    unfinished = final.with_name(name + ".part")
    with unfinished.open("wb", buffering=0) as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, plan.header, 0)
        for output in outputs:
            _write(descriptor, output, plan)
        for tensor, stored in others.items():
            kept.copy(stored, descriptor, plan.tensors[tensor].begin)
        os.fsync(descriptor)
    os.replace(unfinished, final)
    whole.sync(final.parent)
    return plan.size


def _write(descriptor: int, output: Output, plan: Layout) -> None:
    weight = output.source.weight
    values, scales = plan.tensors.get(weight.name), plan.tensors.get(weight.scale_name)
    for first, last in blocks(weight):
        rows = output.rows(first, last)
        if output.dtype != "F8_E4M3":
            write_at(descriptor, rows.to(DTYPES[output.dtype]), _row(values, first))
            continue
        came = output.scales.read(first // BLOCK, -(-last // BLOCK)).to(accelerator()) if output.scales else None
        codes, scale = fp8.quantise(rows.to(accelerator()), output.rule, came)
        # The scales may lie in another file than the codes.
        if values is not None:
            write_at(descriptor, codes.cpu(), _row(values, first))
        if scales is not None:
            write_at(descriptor, scale.cpu(), _row(scales, first // BLOCK))


def _row(stored: Stored | None, row: int) -> int:
    """The byte at which a row begins."""
    assert stored is not None
    return stored.begin + row * (stored.nbytes // stored.shape[0])
