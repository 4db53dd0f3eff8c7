"""A moving average of the parameters in CPU memory, updated beside the training step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from dsv3_train.model.init import sharding_metadata


class ParameterEma:
    """FP32 averages of this rank's share of the parameters (report, section 3.2.3).

    Each parameter is averaged on one of the ranks that hold it, taken in turn, so that data parallelism
    divides memory and work. `update` starts the copy off the device and returns; a thread averages while
    the next step computes.
    """

    def __init__(self, chunks: list[GPTModel], decay: float) -> None:
        self.decay = decay
        self._entries = list(_owned(chunks))
        self._averages = [entry.data.detach().float().cpu().clone() for entry in self._entries]
        self._cuda = torch.cuda.is_available()
        # The device fills these while the thread works on last step's; on a CPU a plain copy does.
        self._copies = [torch.empty_like(entry.data, device="cpu", pin_memory=self._cuda) for entry in self._entries]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future | None = None

    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self.wait()
        for copy, entry in zip(self._copies, self._entries, strict=True):
            copy.copy_(entry.data, non_blocking=True)
        copied = None
        if self._cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending = self._thread.submit(self._average, copied)

    def restart(self) -> None:
        """Begin anew from the parameters as they are now."""
        self.wait()
        for average, entry in zip(self._averages, self._entries, strict=True):
            average.copy_(entry.data.detach())

    def wait(self) -> None:
        """Until the last update is in."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @torch.no_grad()
    def _average(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for average, copy in zip(self._averages, self._copies, strict=True):
            average.lerp_(copy.float(), 1.0 - self.decay)

    def sharded_state_dict(self) -> dict:
        """The averages as Megatron's sharded tensors, under the parameters' names prefixed by `ema.`."""
        self.wait()
        state = {}
        for index, (entry, average) in enumerate(zip(self._entries, self._averages, strict=True)):
            changes = {"key": f"ema.{entry.key}", "data": average, "replica_id": (0, 0, 0)}
            if isinstance(entry, ShardedTensor):
                changes["dtype"] = torch.float32
            state[str(index)] = replace(entry, **changes)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take the averages out of a loaded `sharded_state_dict`."""
        for index, average in enumerate(self._averages):
            average.copy_(state[str(index)])


def _owned(chunks: list[GPTModel]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """The parameters (as Megatron's sharded entries) that this rank averages."""
    for chunk in chunks:
        entries = [
            entry
            for entry in nested_values(chunk.sharded_state_dict(metadata=sharding_metadata()))
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and isinstance(entry.data, torch.nn.Parameter)
        ]
        for index, entry in enumerate(entries):
            *copies, data_rank = entry.replica_id
            expert = not getattr(entry.data, "allreduce", True)
            holders = (
                parallel_state.get_expert_data_parallel_world_size()
                if expert
                else parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            )
            if not any(copies) and data_rank == index % holders:
                yield entry
