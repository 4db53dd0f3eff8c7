"""What ranks tell one another that is no tensor: JSON, checked against a type. torch's own `*_object` collectives send
pickles, and whoever can take a rank's place would run code on every other.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from dsv3_train.errors import UserError


def exchange(
    kind: Any, mine: Any, group: dist.ProcessGroup | None = None, only: int | None = None, source: int | None = None
) -> list[Any]:
    """What each rank of a group says, in the order of ranks. Collective.

    Args:
        kind: type of what is said, as pydantic reads it: `str | None`, a dataclass, `list[tuple[int, str]]`.
        mine: what this rank says.
        group: None: all ranks.
        only: the one rank that is told; others get an empty list. (As `torch.distributed.gather`.)
        source: the one rank that speaks; what others say is not heard, and the list has one entry.

    Raises:
        UserError: what a rank sent is nothing of this kind.
    """
    adapter = TypeAdapter(kind)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    world, rank = dist.get_world_size(group), dist.get_rank()
    speaks = source is None or rank == source
    # Not pydantic's own JSON, in which an infinite number is null.
    text = json.dumps(adapter.dump_python(mine, mode="json")).encode() if speaks else b""
    length = torch.tensor([len(text)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(size) for size in torch.cat(lengths).tolist()]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    if text:
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if source is not None:
        dist.broadcast(padded, source, group=group)
        told = {source: padded[: sizes[ranks.index(source)]]}
    elif only is None:
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group=group)
        told = {who: part[:size] for who, part, size in zip(ranks, parts, sizes, strict=True)}
    else:
        received = [torch.empty_like(padded) for _ in range(world)] if rank == only else None
        dist.gather(padded, received, only, group=group)
        told = {who: part[:size] for who, part, size in zip(ranks, received or [], sizes, strict=False)}
    return [_read(adapter, who, bytes(part.cpu().numpy())) for who, part in told.items()]


def _read(adapter: TypeAdapter[Any], rank: int, text: bytes) -> Any:
    try:
        return adapter.validate_python(json.loads(text))
    except (ValueError, RecursionError, ValidationError) as error:
        raise UserError(
            f"rank {rank}: what it sent is not what this rank expects ({str(error).splitlines()[0]}); "
            "install the same version everywhere"
        ) from None
