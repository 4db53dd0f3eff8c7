"""Writing checkpoints: whole or not at all, while training goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from dsv3_train.checkpoint.directory import UNFINISHED, prune, step_path

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


class CheckpointWriter:
    """Saves sharded states under `root`, keeping the newest `keep_last`.

    A checkpoint is written under another name and renamed when every rank is done, so that a run never
    finds half of one. Asynchronous saving forks one writer per rank, from memory as it is at the call;
    `poll` must be called on all ranks now and then (the loop does, every step), `finish` at the end.
    """

    def __init__(self, root: Path, keep_last: int, asynchronous: bool, saved: Callable[[Path], None]) -> None:
        self.root = root
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._saved = saved  # told on rank 0 when a checkpoint is whole
        self._queue = AsyncCallsQueue()
        self._leader = torch.distributed.get_rank() == 0

    def save(self, state: dict, step: int) -> Path:
        """Begin to save `state` as the checkpoint of `step`; returns where it will lie. Collective."""
        self.finish()  # one at a time: a second would only compete for the disk
        final = step_path(self.root, step)
        unfinished = final.with_name(final.name + UNFINISHED)
        if self._leader:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        torch.distributed.barrier()
        request = dist_checkpointing.save(state, str(unfinished), async_sharded_save=self.asynchronous)
        if request is None:
            self._finalize(unfinished, final)
        else:
            request.add_finalize_fn(lambda: self._finalize(unfinished, final))
            self._queue.schedule_async_request(request)
        return final

    def _finalize(self, unfinished: Path, final: Path) -> None:
        if self._leader:
            if final.exists():  # the same step again, after a resume from an earlier one
                shutil.rmtree(final)
            unfinished.rename(final)
            prune(self.root, self.keep_last)
            self._saved(final)
        torch.distributed.barrier()

    def poll(self) -> None:
        """Complete a save whose writers are done on all ranks. Collective while one is under way."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for the save under way, if any. Collective."""
        self._queue.maybe_finalize_async_calls(blocking=True)
