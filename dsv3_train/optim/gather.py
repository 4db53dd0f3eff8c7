"""Optimizer states of ZeRO-1 put together for a checkpoint: on each rank those alone that it writes.

Megatron-core's `DistributedOptimizer.get_parameter_state_dp_zero` copies every state to the host, back to the GPU,
gathers, to the host again, joins and copies once more (distrib_optimizer.py:1020-1118): several times all states, anew
on every rank, while training stands still. Here a state dict is made of tensors without storage, all that ranks need to
divide the writing (checkpoint/sharing.py); then states are gathered where they are, a stretch at a time, and each rank
copies its share to the host, once. `tests/distributed/test_gather.py` holds the two against each other, and fails once
Megatron-core no longer needs this.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATES = ("param", "exp_avg", "exp_avg_sq")
_STRETCH = 1 << 26
"""Elements that are gathered at a time from all ranks: 256 MiB of GPU memory."""

_Places = list[tuple[int, torch.Tensor]]
"""Where in a buffer states are wanted, in order: the first element of a part, and the memory that takes it."""


def install(optimizer: MegatronOptimizer) -> None:
    """Let an optimizer, or those that it is chained of, put their states together in this way."""
    for one in _with_shares(optimizer):
        one.outlines = [
            {name: torch.empty(buffer.numel, dtype=torch.float32, device="meta") for name in _STATES}
            for buffer in one.buffers
        ]
        one.get_parameter_state_dp_zero = partial(_outline, one)


def fill(optimizer: MegatronOptimizer, tensors: Iterable[ShardedTensor]) -> None:
    """Give the optimizer's states among `tensors`, of a state dict to be saved, their values.

    Each becomes an FP32 tensor in host memory, pinned where there is a GPU. Collective over data parallelism.

    Raises:
        RuntimeError: a tensor without storage that is no view of the optimizer's states.
    """
    wanted: dict[int, list[ShardedTensor]] = {}
    for x in tensors:
        if x.data.is_meta:
            wanted.setdefault(_storage(x.data), []).append(x)
    for one in _with_shares(optimizer):
        for buffer, ranges, outline in zip(one.buffers, one.gbuf_ranges, one.outlines, strict=True):
            places = {name: _allocate(wanted.pop(_storage(flat), [])) for name, flat in outline.items()}
            ((_, shares),) = ranges.items()
            for bucket, share in zip(buffer.buckets, shares, strict=True):
                _gather(one, bucket, share["param_map"], places)
    torch.cuda.synchronize()
    if wanted:
        raise RuntimeError(f"no optimizer has these states: {[x.key for some in wanted.values() for x in some]}")


def _with_shares(optimizer: MegatronOptimizer) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if isinstance(one, DistributedOptimizer)]


def _storage(x: torch.Tensor) -> int:
    """What all views of one tensor have in common, with or without memory."""
    return x.untyped_storage()._cdata


def _outline(
    optimizer: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any] | None:
    """Every buffer's states: FP32 [numel], to be filled from a checkpoint, or to be asked for by `fill`."""
    if use_gloo_comm or not return_on_all_ranks:  # kinds of checkpoint that are not ours
        return DistributedOptimizer.get_parameter_state_dp_zero(
            optimizer, use_gloo_comm, empty_data, return_on_all_ranks
        )
    whole: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, outline) in enumerate(zip(optimizer.buffers, optimizer.outlines, strict=True)):
        # What is read may come by another tensor, and untouched pages take no memory.
        states = {name: torch.empty_like(flat, device="cpu") if empty_data else flat for name, flat in outline.items()}
        (dtype,) = optimizer.gbuf_ranges[number]
        whole[number] = {dtype: {**states, "numel_unpadded": buffer.numel_unpadded}}
    return whole


def _allocate(tensors: list[ShardedTensor]) -> _Places:
    """Memory on the host for views of one buffer, whose data it becomes."""
    places: _Places = []
    for x in tensors:
        outline = x.data
        x.data = torch.empty(outline.shape, dtype=outline.dtype, device="cpu", pin_memory=torch.cuda.is_available())
        length, apart = 1, list(zip(outline.shape, outline.stride(), strict=True))
        while apart and (apart[-1][0] == 1 or apart[-1][1] == length):  # what lies without gaps in the buffer
            length *= apart.pop()[0]
        firsts = [outline.storage_offset()]
        for size, stride in apart:
            firsts = [first + i * stride for first in firsts for i in range(size)]
        places += zip(firsts, x.data.view(-1).split(length), strict=True)
    return sorted(places, key=_first)


def _first(place: tuple[int, torch.Tensor]) -> int:
    return place[0]


def _gather(optimizer: Any, bucket: Any, params: dict, places: dict[str, _Places]) -> None:
    """Fill what is wanted of the states of one bucket, of whose parameters this rank has the ranges in `params`."""
    group = optimizer.data_parallel_group
    ranks = group.size()
    if ranks == 1:
        for param, at in params.items():
            own = optimizer._get_main_param_and_optimizer_states(param)
            for name, some in places.items():
                _deliver(own[name].detach().view(-1), at["gbuf_world"].start, some)
        return
    share = bucket.grad_data.numel() // ranks
    length = min(max(_STRETCH // ranks, 1), share)
    mine = {name: bucket.grad_data.new_empty(length, dtype=torch.float32) for name in places}
    everyone = bucket.grad_data.new_empty(ranks * length, dtype=torch.float32)
    for start in range(0, share, length):
        stretch = range(start, min(start + length, share))
        _copy(optimizer, params, mine, stretch)
        for name, x in mine.items():
            gathered = everyone[: ranks * len(stretch)]
            torch.distributed.all_gather_into_tensor(gathered, x[: len(stretch)], group=group)
            for rank, theirs in enumerate(gathered.view(ranks, -1)):
                _deliver(theirs, bucket.offset + rank * share + start, places[name])


def _copy(optimizer: Any, params: dict, to: dict[str, torch.Tensor], stretch: range) -> None:
    """The part of this rank's share that lies in `stretch`; between parameters there may be padding, left as it is."""
    for param, at in params.items():
        place = at["gbuf_local"]
        begin, end = max(place.start, stretch.start), min(place.end, stretch.stop)
        if begin >= end:
            continue
        own = optimizer._get_main_param_and_optimizer_states(param)
        for name, x in to.items():
            part = own[name].detach().view(-1)[begin - place.start : end - place.start]
            x[begin - stretch.start : end - stretch.start].copy_(part)


def _deliver(x: torch.Tensor, start: int, places: _Places) -> None:
    """Copy what is wanted of `x`, a part of a buffer that begins at `start`."""
    end = start + len(x)
    for first, to in places[max(bisect_right(places, start, key=_first) - 1, 0) :]:
        if first >= end:
            return
        begin, last = max(first, start), min(first + len(to), end)
        if begin < last:
            to[begin - first : last - first].copy_(x[begin - start : last - start], non_blocking=True)
