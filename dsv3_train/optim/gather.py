"""Optimizer states of ZeRO-1 put together for a checkpoint, without Megatron-core's detours through host memory.

Its `DistributedOptimizer.get_parameter_state_dp_zero` copies every state to the host, back to the GPU, gathers, to the
host again, joins and copies once more (distrib_optimizer.py:1020-1118): several times the memory that a checkpoint
keeps, anew on every rank, while training stands still. Here states are gathered where they are, a stretch at a time,
and copied once. `tests/distributed/test_gather.py` holds the two against each other, and fails once Megatron-core no
longer needs this.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATES = ("param", "exp_avg", "exp_avg_sq")
_STRETCH = 1 << 24
"""Elements of a rank's share that are gathered at a time: 64 MiB from each rank."""


def install(optimizer: MegatronOptimizer) -> None:
    """Let an optimizer, or those that it is chained of, put its states together in this way."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer):
            one.get_parameter_state_dp_zero = partial(_whole_states, one)


def _whole_states(
    optimizer: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> dict[Any, Any] | None:
    """Every buffer's states on every rank: FP32 [numel] in host memory. Collective over data parallelism."""
    if use_gloo_comm or not return_on_all_ranks:  # kinds of checkpoint that are not ours
        return DistributedOptimizer.get_parameter_state_dp_zero(
            optimizer, use_gloo_comm, empty_data, return_on_all_ranks
        )
    whole: dict[Any, Any] = {"buckets_coalesced": True}
    for number, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        buffer = optimizer.buffers[number]
        # Empty: what is read from a checkpoint may come by another tensor, and untouched pages take no memory.
        states = {name: torch.empty(buffer.numel_unpadded, dtype=torch.float32, device="cpu") for name in _STATES}
        whole[number] = {dtype: {**states, "numel_unpadded": buffer.numel_unpadded}}
        first = 0
        for bucket, share in zip(buffer.buckets, () if empty_data else buckets, strict=not empty_data):
            last = first + bucket.numel_unpadded
            _gather(optimizer, bucket, share["param_map"], {name: x[first:last] for name, x in states.items()})
            first = last
    return whole


def _gather(optimizer: DistributedOptimizer, bucket: Any, params: dict, states: dict[str, torch.Tensor]) -> None:
    """Fill the states of one bucket, of whose parameters this rank has the ranges in `params`."""
    group = optimizer.data_parallel_group
    ranks = group.size()
    share = bucket.grad_data.numel() // ranks
    if ranks == 1:
        _copy(optimizer, params, states, range(share))
        return
    length = min(_STRETCH, share)
    mine = {name: bucket.grad_data.new_empty(length, dtype=torch.float32) for name in states}
    everyone = bucket.grad_data.new_empty(ranks * length, dtype=torch.float32)
    for start in range(0, share, length):
        stretch = range(start, min(start + length, share))
        _copy(optimizer, params, mine, stretch)
        for name, x in mine.items():
            gathered = everyone[: ranks * len(stretch)]
            torch.distributed.all_gather_into_tensor(gathered, x[: len(stretch)], group=group)
            for rank, theirs in enumerate(gathered.view(ranks, -1)):
                # The last ranks' shares end in padding.
                place = states[name][rank * share + stretch.start : rank * share + stretch.stop]
                place.copy_(theirs[: len(place)])


def _copy(optimizer: DistributedOptimizer, params: dict, to: dict[str, torch.Tensor], stretch: range) -> None:
    """The part of this rank's share that lies in `stretch`; between parameters there may be padding, left as it is."""
    for param, places in params.items():
        place = places["gbuf_local"]
        begin, end = max(place.start, stretch.start), min(place.end, stretch.stop)
        if begin >= end:
            continue
        own = optimizer._get_main_param_and_optimizer_states(param)
        for name, x in to.items():
            part = own[name].detach().view(-1)[begin - place.start : end - place.start]
            x[begin - stretch.start : end - stretch.start].copy_(part)
