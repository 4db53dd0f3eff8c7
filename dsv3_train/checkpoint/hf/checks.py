"""Checksums of a checkpoint's files, taken just before the values in them are read.

A file is read for its checksum and at once again for its values, which finds it in memory: the disk is read once, as
long as a file fits there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dsv3_train.checkpoint import checksums
from dsv3_train.checkpoint.hf.sharded import Checkpoint, open_checkpoint
from dsv3_train.checkpoint.hf.sides import Side
from dsv3_train.errors import UserError

Check = tuple[str, int, str]
"""A file's path, and its bytes and SHA-256 as written."""


def check(where: str, file: str, size: int, digest: str) -> int:
    """Read a file for its checksum; its size.

    Args:
        where: not used; as all functions of `work.Unit` have it.

    Raises:
        UserError: it is not what was written.
    """
    try:
        fault = checksums.fault_of(Path(file), (size, digest))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; take another checkpoint") from None
    if fault:
        raise UserError(f"{Path(file).parent}: the checkpoint is damaged ({fault}); take another")
    return size


def in_turn(groups: Sequence[Iterable[Side]]) -> list[list[Check]]:
    """Before each group of tensors that is read, the files to check that no group before it has; what no group reads of
    their checkpoints comes before the first."""
    order: list[list[Check]] = [[] for _ in groups]
    left: dict[str, Check] = {}
    for path in dict.fromkeys(path for group in groups for side in group if (path := _checkpoint(side))):
        left |= {check[0]: check for check in of(open_checkpoint(path))}
    for number, group in enumerate(groups):
        for side in group:
            if path := _checkpoint(side):
                for chunk in open_checkpoint(path).tensors[side.weight.key].chunks:
                    if chunk.file in left:
                        order[number].append(left.pop(chunk.file))
    if order:
        order[0][:0] = left.values()
    return order


def of(checkpoint: Checkpoint) -> list[Check]:
    """Every file that its manifest lists; none where it has no manifest."""
    return [(str(checkpoint.path / name), *entry) for name, entry in (checkpoint.manifest or {}).items()]


def told(checkpoint: Checkpoint) -> list[str]:
    """A note where damage cannot be seen."""
    lacking = f"{checkpoint.path}: has no {checksums.NAME}, so values that have changed since cannot be told"
    return [lacking] if checkpoint.manifest is None else []


def _checkpoint(side: Side) -> Path | None:
    return getattr(side, "checkpoint", None)
