"""`dsv3 convert from-hf`: a Hugging Face directory into a sharded checkpoint, for any layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3_train import whole
from dsv3_train.checkpoint import checksums
from dsv3_train.checkpoint.directory import step_path
from dsv3_train.checkpoint.hf import beside, origin, own_class, scales, work
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf.files import DTYPES, itemsize
from dsv3_train.checkpoint.hf.fp8 import Rule
from dsv3_train.checkpoint.hf.published import Directory, absent_copies, find, open_directory
from dsv3_train.checkpoint.hf.sharded_writer import Part, Placed, finish, write_parts
from dsv3_train.checkpoint.hf.sides import Published, blocks
from dsv3_train.checkpoint.hf.work import Progress, Unit
from dsv3_train.checkpoint.tokenizer_home import FOLDER, TOKENIZER, Home
from dsv3_train.data import special_tokens
from dsv3_train.errors import UserError
from dsv3_train.recipe import load as recipes
from dsv3_train.recipe.schema import Recipe

Mtp = Literal["keep", "drop"]
_LARGEST_FILE, _SMALLEST_FILE, _FILES = 2 << 30, 128 << 20, 64
_OURS = re.compile(
    r"checkpoints/(step_00000000/(__\d+_0\.distcp|\.metadata(\.tmp)?|common\.pt|metadata\.json|manifest\.json)?)?|"
    r"recipe\.yaml|(hf|tokenizer)/[^/]*"
)
"""What is made in TARGET.unfinished."""
_NOTHING_DONE = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}


@dataclass(frozen=True)
class Block:
    """Rows of a published tensor, and the part of the checkpoint that they become."""

    part: Part
    source: Published
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, every tensor accounted for."""

    directory: Directory
    recipe: Recipe
    mtp: int
    found: list[Published]
    files: list[list[Block]]
    tokenizer: Home
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """To be written, headers apart."""
        return sum(_nbytes(block) for file in self.files for block in file)

    def report(self) -> dict[str, Any]:
        """Counts, for `--json`."""
        taken = {found.weight.name for found in self.found}
        return {
            "source": str(self.directory.path),
            "weights": len(self.found),
            "scales": sum(found.scale is not None for found in self.found),
            "values": sum(found.weight.values for found in self.found),
            "copies": sum(found.weight.copy for found in self.found),
            "left_out": sorted(
                [name for name in self.directory.mtp_names if name not in taken and not self.mtp]
                + [self.directory.published_name(name) for name in self.directory.beside]
            ),
            "dtypes": dict(Counter(found.stored.dtype for found in self.found)),
            "mtp": self.mtp,
            "bytes": self.nbytes,
            "files": len(self.files),
            "memory_per_worker": work.WORKER_BYTES,
            "notes": self.notes,
        }


def make_plan(
    source: Path,
    recipe_ref: str | None,
    overrides: Sequence[str],
    mtp: Mtp | None,
    dtype: Literal["bf16", "fp32"] | None,
    name: str,
) -> Plan:
    """Look at everything that can be wrong before anything is written.

    Raises:
        UserError: files, configuration, recipe or options are at fault.
    """
    directory = open_directory(source)
    directory.check_files()
    modules, notes = _mtp(directory, mtp)
    notes += origin.left_out(source)
    tokenizer = Home(special_tokens.read(source), source)
    recipe = make_recipe(directory, recipe_ref, overrides, modules, name)
    found = find(directory, recipe.model, modules)
    notes += configs.notes(directory.config)
    if directory.main_dtype != "F8_E4M3" and configs.settings(directory.config).get("quantization_config"):
        notes.append("config.json has a quantization_config, but no tensor is FP8")
    rounded = [one for one in found if one.weight.stored == "fp32" and one.stored.dtype != "F32"]
    if rounded:
        notes.append(f"{rounded[0].weight.name} and all routing biases are {rounded[0].stored.dtype} in these files")
    notes += beside.told(directory.beside)
    return Plan(directory, recipe, modules, found, _files(found, dtype), tokenizer, notes)


def _mtp(directory: Directory, asked: Mtp | None) -> tuple[int, list[str]]:
    """MTP modules to convert."""
    declared, there = directory.declared_mtp, directory.mtp
    layer = int(configs.settings(directory.config)["num_hidden_layers"])
    uncounted = beside.undeclared_layers(directory.tensors, layer + declared)
    if uncounted and asked != "drop":
        raise UserError(
            f"{directory.path / 'config.json'}: num_nextn_predict_layers: {declared}, but the files have MTP in "
            f"layer {min(uncounted)}; say --mtp drop to leave it out, or set {declared + len(uncounted)} to train it"
        )
    lacking = f"config.json says num_nextn_predict_layers {declared}, but the files have nothing of layer {layer}"
    if asked == "keep" and not there:
        reason = lacking if declared else "config.json says that there is none"
        raise UserError(f"{directory.path}: no MTP to keep: {reason}; leave --mtp out, or say --mtp drop")
    if asked == "drop":
        return 0, []
    said = declared and own_class.says(directory.config, "num_nextn_predict_layers")
    return there, [f"{lacking}: converted without MTP"] if said and not there else []


def make_recipe(directory: Directory, ref: str | None, overrides: Sequence[str], mtp: int, name: str) -> Recipe:
    """The recipe of the model: derived from config.json, or `ref`, which must agree with it.

    Raises:
        UserError: key by key, what contradicts or is not supported.
    """
    file = str(directory.path / "config.json")
    plain_name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "model"
    plain = configs.derive(directory.config, plain_name, mtp, directory.main_dtype)
    if ref is None:
        recipe = recipes.build(plain, file, overrides)
    else:
        recipes.build(plain, file)  # what config.json itself asks too much of
        recipe = recipes.load(ref, overrides)
    chosen = [override.partition("=")[0].strip() for override in overrides]
    wrong = configs.contradictions(recipe, directory.config, mtp, chosen)
    if recipe.model.num_nextn_predict_layers != mtp:
        wrong = [line for line in wrong if "num_nextn_predict_layers" not in line]
        wrong.append(
            f"model.num_nextn_predict_layers: {recipe.model.num_nextn_predict_layers} in the recipe, but {mtp} "
            "MTP modules are converted; set it to that, or see --mtp"
        )
    if wrong:
        raise UserError("\n".join(f"{ref or file}: {line}" for line in wrong))
    return recipe


def _files(found: Sequence[Published], dtype: str | None) -> list[list[Block]]:
    """The checkpoint's files, each of parts that lie near each other in the source."""
    kept = [one for one in found if not one.weight.copy]
    types: dict[str, set[str]] = {}
    for one in kept:
        types.setdefault(one.weight.key, set()).add(_kept_as(one, dtype))
    todo = []
    for one in sorted(kept, key=lambda one: (one.stored.file, one.stored.begin)):
        # A tensor of the checkpoint has one type: FP32 if what it is made of has several.
        (kind, *others) = types[one.weight.key]
        todo += [_block(one, first, last, "F32" if others else kind) for first, last in blocks(one.weight)]
    total = sum(map(_nbytes, todo))
    bound = max(_SMALLEST_FILE, min(_LARGEST_FILE, total // _FILES))
    files: list[list[Block]] = []
    size = bound
    for block in todo:
        if size + _nbytes(block) > bound:
            files.append([])
            size = 0
        files[-1].append(block)
        size += _nbytes(block)
    return files


def _kept_as(one: Published, dtype: str | None) -> str:
    """FP8 as FP32, which brings every code and scale back, all else as it is; unless told otherwise."""
    if one.weight.stored == "fp32":
        return "F32"
    as_it_is = "F32" if one.scale is not None else one.stored.dtype
    return {None: as_it_is, "bf16": "BF16", "fp32": "F32"}[dtype]


def _block(one: Published, first: int, last: int, dtype: str) -> Block:
    weight = one.weight
    dim = len(weight.key_shape) - len(weight.shape)
    offset, sizes = list(weight.offset), list(weight.extent)
    offset[dim] += first
    sizes[dim] = last - first
    part = Part(weight.key, weight.key_shape, tuple(offset), tuple(sizes), dtype)
    return Block(part, one, first, last)


def _nbytes(block: Block) -> int:
    values = (block.last - block.first) * (block.source.weight.values // block.source.weight.shape[0])
    return values * itemsize(block.part.dtype)


def convert(plan: Plan, target: Path, workers: int | None, progress: Progress) -> dict[str, Any]:
    """Write TARGET: a run directory with `recipe.yaml`, `checkpoints/step_00000000`, `hf/` and `tokenizer/`.

    It is there whole or not at all.

    Peak memory is `work.WORKER_BYTES` for each of at most `work.MOST_WORKERS` workers, whatever the model's size.

    Raises:
        UserError: a file is damaged, the disk is full, or TARGET cannot be written.
    """
    units = [Unit(i, sum(map(_nbytes, file)), write_file, (i, file)) for i, file in enumerate(plan.files)]
    fingerprint = [
        "with checksums",
        _fingerprint(plan),
        [[asdict(block.part) for block in file] for file in plan.files],
    ]
    with work.unfinished(target, fingerprint, lambda relative: _OURS.fullmatch(relative) is not None) as where:
        checkpoint = step_path(where / "checkpoints", 0)
        checkpoint.mkdir(parents=True, exist_ok=True)
        _check_copies(plan, progress)
        count = work.worker_count(workers, plan.nbytes)
        written = work.run(where, units, count, progress, "converting")
        parts = [[block.part for block in file] for file in plan.files]
        placed = [of_file for of_file, _, _ in written]
        sums = {name: tuple(entry) for _, _, of_file in written for name, entry in of_file.items()}
        small = {"position": _NOTHING_DONE, "topology": {}, TOKENIZER: plan.tokenizer.sha256}
        finish(checkpoint, list(zip(parts, placed, strict=True)), small, sums)
        (where / "recipe.yaml").write_text(recipes.dump(plan.recipe), encoding="utf-8")
        looked = {
            name: scales.Looked(Rule(*rule) if rule else None, lossy)
            for _, of_file, _ in written
            for name, (rule, lossy) in of_file.items()
        }
        absent = absent_copies(plan.directory, plan.recipe.model, plan.mtp)
        origin.keep(plan.directory, plan.found, absent, looked, where / origin.FOLDER)
        plan.tokenizer.write(where / FOLDER)
    report = plan.report()
    changing = sorted(name for name, one in looked.items() if one.lossy)
    return {
        **report,
        "notes": [*report["notes"], *scales.told(looked)],
        "bytes_change": changing,
        "target": str(target),
    }


def _fingerprint(plan: Plan) -> list[Any]:
    """Tells a source that changed under an interrupted conversion."""
    files = sorted({found.stored.file for found in plan.found})
    stats = [Path(file).stat() for file in files]
    return [*zip(files, [(stat.st_size, stat.st_mtime_ns) for stat in stats], strict=True), recipes.dump(plan.recipe)]


def write_file(
    where: str, number: int, file: list[Block]
) -> tuple[list[Placed], dict[str, scales.Looked], checksums.Sums]:
    """Write one file of the checkpoint; where its parts lie in it, what the FP8 scales of those begun in it say, and
    its checksum."""
    torch.set_num_threads(1)

    def values(i: int) -> torch.Tensor:
        block = file[i]
        rows = block.source.rows(block.first, block.last)
        return rows.to(DTYPES[block.part.dtype]).view(block.part.sizes)

    parts = [block.part for block in file]
    folder = step_path(Path(where, "checkpoints"), 0)
    placed = write_parts(folder, number, parts, values)
    whole.sync(folder)
    begun = [block.source for block in file if block.first == 0 and block.source.scale is not None]
    looked = {source.weight.name: scales.look(source) for source in begun}
    return placed, looked, checksums.sums({folder / name for _, name, _, _ in placed})


def _check_copies(plan: Plan, progress: Progress) -> None:
    """MTP's embedding and head must be the main model's: Megatron has them once."""
    originals = {found.weight.key: found for found in plan.found if not found.weight.copy}
    copies = [found for found in plan.found if found.weight.copy]
    total, done = sum(found.stored.nbytes for found in copies), 0
    for copy in copies:
        original = originals[copy.weight.key]
        for first, last in blocks(copy.weight):
            ours, theirs = (found.rows(first, last) for found in (original, copy))
            if not torch.equal(ours, theirs):
                raise UserError(
                    f"{copy.stored.file}: {copy.weight.name} differs from {original.weight.name}, and this model has "
                    "one for both; --mtp drop leaves MTP out"
                )
            done += ours.numel() * itemsize(copy.stored.dtype)
            progress("comparing MTP's copies", done, total)
