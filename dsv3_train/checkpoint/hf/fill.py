"""Published weights straight into a model, whatever its layout: each rank reads the rows that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Optional

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from dsv3_train.checkpoint.hf import beside, origin
from dsv3_train.checkpoint.hf import config as configs
from dsv3_train.checkpoint.hf.names import BLOCK
from dsv3_train.checkpoint.hf.published import Directory, absent_copies, find, open_directory
from dsv3_train.checkpoint.hf.scales import Looked, look, told
from dsv3_train.checkpoint.hf.sides import Published, Side
from dsv3_train.checkpoint.hf.work import BLOCK_VALUES
from dsv3_train.checkpoint.state import model_state
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.exchange import exchange

_MAY_DIFFER = ("model.rope_theta", "model.rope_scaling")
"""What a context extension changes; the weights do not depend on it."""


def load_published(path: Path, recipe: Recipe, chunks: list[GPTModel], run_dir: Path | None = None) -> list[str]:
    """Put a Hugging Face directory's weights and routing biases into this rank's chunks; returns notes for the log.

    With `run_dir`, that run keeps of the directory what brings it back (origin.py). Collective.

    Raises:
        UserError: the directory is damaged, or its config.json contradicts the recipe.
    """
    directory = open_directory(path)
    directory.check_files()
    modules = recipe.model.num_nextn_predict_layers
    if modules and not directory.mtp:
        uncounted = beside.undeclared_layers(
            directory.tensors, int(configs.settings(directory.config)["num_hidden_layers"])
        )
        if uncounted:
            raise UserError(
                f"{path / 'config.json'}: num_nextn_predict_layers: 0, but the files have MTP in layer "
                f"{min(uncounted)}; set {len(uncounted)} there to train it"
            )
        raise UserError(
            f"{path}: has no MTP; set model.num_nextn_predict_layers=0 and schedule.mtp_weight=0, or take other files"
        )
    differences = configs.contradictions(recipe, directory.config, modules)
    wrong = [line for line in differences if not line.startswith(_MAY_DIFFER)]
    if wrong:
        raise UserError("\n".join(f"{path}: {line}; set what config.json says, or take other files" for line in wrong))
    found = find(directory, recipe.model, modules)
    fill(chunks, found)
    notes = configs.notes(directory.config) + [line for line in differences if line not in wrong]
    notes += beside.told(directory.beside)
    if run_dir is not None:
        notes += _keep(directory, found, absent_copies(directory, recipe.model, modules), run_dir)
    if directory.mtp and not modules:
        notes.append(f"{path}: its MTP is left out, the recipe has none")
    return notes


def _keep(directory: Directory, found: list[Published], absent: list[str], run_dir: Path) -> list[str]:
    """What `dsv3 convert from-hf` keeps; the ranks share looking at the scales. Returns what these say."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = [one for one in found if one.scale is not None][rank::world]
    shares = exchange(dict[str, Looked], {one.weight.name: look(one) for one in own})
    looked = {name: one for share in shares for name, one in share.items()}

    def keep() -> None:
        with origin.anew(run_dir) as folder:
            origin.keep(directory, found, absent, looked, folder)

    on_first(keep, run_dir)
    return told(looked)


def carry(begun: Path, run_dir: Path) -> None:
    """Give a run that begins from a checkpoint what that keeps of a Hugging Face directory. Collective.

    Raises:
        UserError: on every rank: it is damaged, or the run directory cannot be written.
    """
    on_first(lambda: origin.carry(begun, run_dir), run_dir)


def on_first(work: Callable[[], None], run_dir: Path) -> None:
    """Do something on rank 0 that writes to a run directory, and fail on all ranks where it fails."""
    said: str | None = None
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except OSError as error:
            said = f"runtime.run_dir: {run_dir / origin.FOLDER} cannot be written ({error.strerror or error})"
        except UserError as error:
            said = str(error)
    (told_by_first,) = exchange(Optional[str], said, source=0)
    if told_by_first is not None:
        raise UserError(told_by_first)


@torch.no_grad()
def fill(chunks: list[GPTModel], sides: Iterable[Side]) -> None:
    """Put values into every parameter and routing bias of this rank's chunks.

    Raises:
        UserError: a tensor that the model has is not among `sides`, or is damaged.
    """
    by_key: dict[str, list[Side]] = {}
    for side in sides:
        if not side.weight.copy:
            by_key.setdefault(side.weight.key, []).append(side)
    for entry in nested_values(model_state(chunks)):
        if isinstance(entry, ShardedTensorFactory):  # SwiGLU's gate and up: one parameter, two pieces
            entry.data.copy_(entry.merge_fn([_values(piece, by_key) for piece in entry.build()]))
        elif isinstance(entry, ShardedTensor):
            entry.data.copy_(_values(entry, by_key))


def _values(piece: ShardedTensor, by_key: Mapping[str, list[Side]]) -> torch.Tensor:
    """A piece's values, FP32, [its own shape]."""
    extent = [1] * piece.prepend_axis_num + list(piece.local_shape)
    begin = list(piece.global_offset)
    out = torch.full(extent, torch.nan)
    for side in by_key.get(piece.key, ()):
        _copy(side, begin, out)
    if out.isnan().any():
        raise UserError(f"{piece.key}: the files have no values for a part of it; check the recipe's model section")
    return out.view(tuple(piece.local_shape))


def _copy(side: Side, begin: list[int], out: torch.Tensor) -> None:
    """What a published tensor has of a region of Megatron's tensor: it begins at `begin` and is as large as `out`."""
    weight = side.weight
    spans = []
    for start, size, own, own_size in zip(begin, out.shape, weight.offset, weight.extent, strict=True):
        first, last = max(start, own), min(start + size, own + own_size)
        if first >= last:
            return
        spans.append((first, last))
    dim = len(weight.key_shape) - len(weight.shape)
    (first, last), *others = [(a - own, b - own) for (a, b), own in zip(spans[dim:], weight.offset[dim:], strict=True)]
    step = max(BLOCK, BLOCK_VALUES // (weight.values // weight.shape[0]) // BLOCK * BLOCK)
    for aligned in range(first // BLOCK * BLOCK, last, step):
        upper = min(aligned + step, last)
        rows = side.rows(aligned, upper)
        lower = max(first, aligned)
        source = rows[lower - aligned :]
        for axis, (a, b) in enumerate(others, 1):
            source = source.narrow(axis, a, b - a)
        target = out
        for axis, ((a, b), start) in enumerate(zip(spans, begin, strict=True)):
            if axis == dim:
                a, b = lower + weight.offset[dim], upper + weight.offset[dim]
            target = target.narrow(axis, a - start, b - a)
        target.copy_(source.view(target.shape) if source.is_contiguous() else source.reshape(target.shape))
