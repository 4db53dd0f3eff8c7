"""Silent corruption: a machine that computes wrongly, found where two results must be the same bit for bit."""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Optional

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_train.runtime import heartbeat
from dsv3_train.runtime.exchange import exchange
from dsv3_train.runtime.pipeline_groups import replicas
from dsv3_train.training.losses import Losses
from dsv3_train.training.step import Trainer


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over a tensor's bits, an int64 scalar: any single flipped bit changes it. Of an FP8 weight: its values'."""
    if is_float8tensor(tensor):  # it has no flat view, and nobody sets the padding of its scales
        tensor = dequantize_fp8_tensor(tensor)
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.int32 if flat.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


def loss_bits(losses: Losses) -> list[bytes | None]:
    """The bytes of each of a step's losses: by value, NaN would differ from itself."""
    return [None if value is None else struct.pack("d", value) for value in astuple(losses)]


def gradient_bits(trainer: Trainer) -> torch.Tensor:
    """One sum per gradient buffer of this rank, int64 [buffers]."""
    return torch.stack([bits(buffer.grad_data) for chunk in trainer.chunks for buffer in _buffers(chunk)])


def finite_gradients(trainer: Trainer) -> bool:
    """Whether no gradient of this rank is NaN or infinite: its own contribution as well as what it reduced."""
    return all(bool(torch.isfinite(buffer.grad_data.sum())) for chunk in trainer.chunks for buffer in _buffers(chunk))


def _buffers(chunk):
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


@dataclass
class Rerun:
    """Computes a step's gradients twice."""

    trainer: Trainer
    compute: Callable[[], Losses]
    """The step, without its update; it must find the same state each time."""

    def compare(self, first: Losses) -> str | None:
        """Compute again; the ranks whose results differ from `first`, in words. Collective."""
        heartbeat.mark("the same step again")
        before = gradient_bits(self.trainer)
        again = self.compute()
        same = loss_bits(again) == loss_bits(first) and torch.equal(before, gradient_bits(self.trainer))
        return _who(not same, "computed the same step twice, with different bits")


def compare_replicas(trainer: Trainer) -> str | None:
    """Compare all parameters over their replicas; the ranks that differ from most, in words. Collective.

    Replicas are data-parallel ones, and those of the rank opposite in dualpipe. Between a backward pass and the update:
    with ZeRO-1 all come out of one all-gather after an update (or in the forward pass, if left to it), which would
    overwrite what has changed since the one before.
    """
    heartbeat.mark("comparison of replicas")
    dense: list[tuple[str, torch.Tensor]] = []
    expert: list[tuple[str, torch.Tensor]] = []
    for model in trainer.models:
        for name, parameter in model.named_parameters():
            (dense if getattr(parameter, "allreduce", True) else expert).append((name, bits(parameter)))
    copies = replicas()
    groups = copies.groups if copies else ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
    wrong = [*_outliers(dense, groups.dp_cp), *_outliers(expert, groups.expt_dp)]
    named = "has other bits than its replicas in " + (wrong[0] if wrong else "none")
    return _who(bool(wrong), named + (f" and {len(wrong) - 1} more parameters" if wrong[1:] else ""))


def _outliers(sums: list[tuple[str, torch.Tensor]], group: torch.distributed.ProcessGroup) -> list[str]:
    """Names of parameters in which this rank is not of the majority; of two that differ, both."""
    if not sums or group.size() == 1:
        return []
    mine = torch.stack([value for _, value in sums])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, mine, group=group)
    same = torch.stack([other == mine for other in everyone]).sum(dim=0)
    return [name for (name, _), count in zip(sums, same.tolist(), strict=True) if 2 * count <= group.size()]


def _agree(flag: bool) -> bool:
    any_flag = torch.tensor([flag], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(any_flag)
    return bool(any_flag.item())


def _who(mine: bool, what: str) -> str | None:
    """`what` and the ranks that say it of themselves, the same text everywhere; None if nobody does. Collective."""
    if not _agree(mine):
        return None
    text = f"rank {torch.distributed.get_rank()} on {platform.node()} {what}" if mine else None
    return "; ".join(line for line in exchange(Optional[str], text) if line)
