"""Reading checkpoints back, into any layout."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_train.checkpoint import checksums, common, contents
from dsv3_train.checkpoint.directory import DAMAGED, complete, damaged, set_aside, sweep
from dsv3_train.checkpoint.sharing import ReadOnce
from dsv3_train.checkpoint.state import (
    Guarded,
    Position,
    model_state,
    set_model_state,
    set_random_state,
    topology,
    training_state,
)
from dsv3_train.checkpoint.tokenizer_home import TOKENIZER, refuse_other
from dsv3_train.errors import UserError
from dsv3_train.optim.ema import ParameterEma
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat
from dsv3_train.runtime.exchange import exchange
from dsv3_train.runtime.rendezvous import Absent


def newest(
    root: Path, verify: bool, usable: Callable[[dict[str, Any]], str | None], told: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint under `root` that is whole and usable; None: there is none at all. Collective.

    A damaged one is named and set aside, and the one before it looked at; one that is not usable stays for the saves
    to come to replace.

    Args:
        verify: read all files for their checksums, divided among the ranks; false: only look whether they are there.
        usable: why not to go on from a checkpoint whose small state this is; None if nothing is against it.
        told: takes each line about a checkpoint that was passed over; on rank 0 it may go into the log.

    Raises:
        UserError: there are checkpoints, and all are damaged.
        Absent: on every rank: a machine cannot read one.
    """
    rank = torch.distributed.get_rank()
    listed: tuple[list[Path], list[Path]] = [], []
    if rank == 0:
        sweep(root)
        listed = complete(root)[::-1], damaged(root)
    ((paths, faults),) = exchange(tuple[list[Path], list[Path]], listed, source=0)
    passed_over, reasons = False, {}
    for path in paths:
        fault, reason = _verified(path) if verify else None, None
        if rank == 0 and fault is None:
            try:
                reason = usable(_common(path))
            except UserError as error:
                fault = str(error)
        ((fault, reason),) = exchange(tuple[Optional[str], Optional[str]], (fault, reason), source=0)
        if fault is None and reason is None:
            return path
        if fault is None:
            told(f"not resumed from {path.name}: {reason}")
            passed_over = True
            continue
        faults.append(path.with_name(path.name + DAMAGED))
        reasons[faults[-1]] = f" ({fault}; set aside under this name)"
        told(f"{path}: damaged ({fault}); set aside as {path.name}{DAMAGED}")
        if rank == 0:
            set_aside(path)
    if faults and not passed_over:
        raise UserError(
            f"{max(faults)}: damaged{reasons.get(max(faults), '')}, and no whole checkpoint is left to go on from; "
            f"put one there, or remove {root} to train anew"
        )
    return None


def trained_on(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the data that it was trained on; nothing where it was written before it did.

    Raises:
        UserError: it cannot be read.
    """
    return _common(path).get("data", {})


def refuse_damaged(path: Path) -> None:
    """Read all files for their checksums, divided among the ranks. Collective.

    Raises:
        UserError: on every rank: one of them is not what was written.
        Absent: on every rank: a machine cannot read it.
    """
    if fault := _verified(path, demanded=False):
        raise UserError(f"{path}: the checkpoint is damaged ({fault}); give another")


def _verified(path: Path, demanded: bool = True) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; its files are divided among them. Collective.

    A wrong file has been read by two ranks, of two machines where there are more: one machine's memory, network or
    mount must not condemn what is whole.

    Raises:
        Absent: on every rank: one machine cannot read the files, or reads them otherwise than another.
    """
    rank, world, host = torch.distributed.get_rank(), torch.distributed.get_world_size(), platform.node()

    def read(share: int) -> tuple[str | None, str | None]:
        try:
            return checksums.fault(path, (share, world), demanded), None
        except OSError as error:
            return None, f"rank {rank} on {host} cannot read {error.filename or path} ({error.strerror})"

    found = exchange(tuple[str, Optional[str], Optional[str]], (host, *read(rank)))
    if unreadable := next((text for _, _, text in found if text), None):
        raise Absent(f"{unreadable}: nothing is wrong with the checkpoint for that; mend it, and start again")
    finder = next((number for number, (_, fault, _) in enumerate(found) if fault), None)
    if finder is None:
        return None
    where, fault, _ = found[finder]
    others = [number for number in range(world) if number != finder] or [finder]
    second = next((number for number in others if found[number][0] != where), others[0])
    mine = read(finder) if rank == second else (None, None)
    ((opinion, _),) = exchange(tuple[Optional[str], Optional[str]], mine, source=second)
    if opinion is None:
        raise Absent(
            f"{path}: rank {finder} on {where} finds {fault}, and rank {second} on {found[second][0]} does not: one of "
            "the two machines reads wrongly; leave it out, and start again"
        )
    return fault


def load_training(
    path: Path,
    recipe: Recipe,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer,
    ema: ParameterEma | None,
    tokenizer: str | None = None,
) -> tuple[Position, Guarded, list[str]]:
    """Put a checkpoint into model, optimizer and average.

    The layout may be another than the one that saved. Collective.

    Args:
        tokenizer: sha256 of the run's tokenizer.json; None: not known.

    Returns:
        the position, what the guard against bad batches knew, and what was not restored, in words.

    Raises:
        UserError: not a checkpoint, damaged, or of another model or tokenizer.
    """
    small = _common(path)
    refuse_other(small.get(TOKENIZER), tokenizer, path)
    # On one node the others find in memory what one has read.
    once = recipe.parallel.world_size > recipe.parallel.gpus_per_node
    if "optimizer" not in small:  # weights alone, as `dsv3 convert from-hf` leaves them
        refuse_rounded_masters(recipe, path)
        load_weights(path, chunks, once)
        return Position(), Guarded(), begin_from_weights(optimizer, ema)
    notes = []
    same_layout = small["topology"] == topology(recipe)
    state = training_state(
        recipe, Position(), Guarded(), chunks, optimizer, ema, loading=True, with_random_state=same_layout
    )
    common.refuse_unlike(path, small["optimizer"], state["optimizer"])
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    if ema is not None and not any(key.startswith("ema.") for key in saved):
        del state["ema"]
        notes.append("the checkpoint has no parameter average: it starts anew from the parameters")
    loaded = _load(path, state, saved, once)
    set_model_state(chunks, loaded)
    settings = [{name: group[name] for name in ("betas", "eps")} for group in optimizer.param_groups]
    with _named(path, "settings of its optimizers are"):
        optimizer.load_state_dict(loaded["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):  # the recipe's, not the checkpoint's
        group.update(own)
    if "ema" in loaded and ema is not None:
        ema.load_state_dict(loaded["ema"])
    elif ema is not None:
        ema.restart()
    if same_layout:
        with _named(path, "the state of its random number generators is"):
            set_random_state(loaded["random"])
    if recipe.precision.fp8 == "delayed":
        notes.append("precision.fp8=delayed: checkpoints do not hold its scales, which begin anew")
    return Position(**loaded["position"]), Guarded(**loaded.get("guarded", {})), notes


def begin_from_weights(optimizer: MegatronOptimizer, ema: ParameterEma | None) -> list[str]:
    """Let optimizer and average take up the weights that were put into the model; returns what to say of it."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Of a run that goes back to where it began: moments, step count, and with BF16 moments masters too, which
        # Megatron's `reload_model_params` leaves as they are.
        one.optimizer.state.clear()
        for group in one.optimizer.param_groups:
            group.pop("step", None)
    optimizer.reload_model_params()
    if ema is not None:
        ema.restart()
    return ["weights alone were loaded: optimizer and schedules begin afresh"]


def refuse_rounded_masters(recipe: Recipe, path: Path) -> None:
    """Refuse weights alone where the model has none but FP8's: the optimizer's masters would begin with their rounding.

    Raises:
        UserError: names the key.
    """
    if recipe.precision.fp8_params:
        raise UserError(
            f"{path}: holds weights alone, which precision.fp8_params would round before the optimizer's FP32 masters "
            "take them up; set precision.fp8_params=false"
        )


def load_weights(path: Path, chunks: list[GPTModel], once: bool = False, tokenizer: str | None = None) -> Position:
    """Put a checkpoint's weights and routing biases into `chunks`. Collective.

    Args:
        once: data-parallel ranks share the reading (checkpoint/sharing.py).
        tokenizer: sha256 of the tokenizer.json in use; None: none is.

    Raises:
        UserError: not a checkpoint, damaged, or of another model or tokenizer.
    """
    refuse_damaged(path)
    small = _common(path)
    refuse_other(small.get(TOKENIZER), tokenizer, path)
    loaded = _load(path, dict(model_state(chunks)), dist_checkpointing.load_tensors_metadata(str(path)), once)
    set_model_state(chunks, loaded)
    return Position(**small["position"])


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """What a library raises over a part of a checkpoint, as that checkpoint's fault."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {what} damaged ({reason[:300]}); take another checkpoint") from None


@functools.lru_cache(maxsize=8)
def _check_table(path: Path, changed: tuple[int, int, int]) -> None:
    """Once: of a run on thousands of GPUs it takes seconds."""
    contents.read(path)


def _common(path: Path) -> dict[str, Any]:
    """See checkpoint/common.py; after a look at the table of contents, which torch would run."""
    try:
        table = (path / contents.NAME).stat()
    except OSError:
        contents.read(path)  # says so
    else:
        _check_table(path, (table.st_ino, table.st_size, table.st_mtime_ns))
    # torch's planner reads the small objects of a checkpoint with weights_only=False; this overrules it.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    return common.read(path)


def _load(path: Path, state: dict, saved: dict[str, ShardedTensor], once: bool) -> dict:
    """Load after a check, tensor by tensor, that the checkpoint has what `state` asks for, in that shape."""
    faults = []
    for entry in nested_values(state):
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in nested_values({"pieces": pieces}):
            if not isinstance(piece, ShardedTensor):
                continue
            if piece.key not in saved:
                faults.append(f"no tensor {piece.key}")
            elif tuple(saved[piece.key].global_shape) != tuple(piece.global_shape):
                faults.append(f"{piece.key} is {list(saved[piece.key].global_shape)}, not {list(piece.global_shape)}")
    if faults:
        more = f" (and {len(faults) - 1} more differences)" if len(faults) > 1 else ""
        raise UserError(f"{path}: a checkpoint of another model: {faults[0]}{more}; check the recipe's model section")
    heartbeat.mark(f"loading of {path.name}")
    try:
        return dist_checkpointing.load(state, str(path), ReadOnce() if once else None)
    except torch.OutOfMemoryError:  # a RuntimeError too, and nothing that the checkpoint can help
        raise
    except (CheckpointException, CheckpointingException, OSError, EOFError, RuntimeError) as error:
        # torch collects what each rank met; its own text is all their tracebacks.
        causes = getattr(error, "failures", {0: (error,)})
        cause = next(iter(causes.values()))[0]
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise UserError(
            f"{path}: the checkpoint is damaged ({reason}); remove it to resume from an earlier one"
        ) from None
