"""Writing checkpoints: whole or not at all, while training goes on, which no failure to write ends."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import platform
import queue
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dsv3_train import whole
from dsv3_train.checkpoint import checksums
from dsv3_train.checkpoint.directory import UNFINISHED, finish, prune, step_path
from dsv3_train.checkpoint.sharing import WriteShares
from dsv3_train.runtime import heartbeat, megatron_versions
from dsv3_train.runtime.exchange import exchange
from dsv3_train.runtime.launch import die_with_parent

logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)

_FORMAT = ("torch_dist", 1)


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's plan of a save alone: who writes what, and the table of contents.

    Its own way of carrying plans out ends a run, or leaves it waiting, when rank 0 alone cannot write (`common.pt`,
    `.metadata`) or a writing process is killed; and starts a manager process per rank that outlives it.
    """

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret, *_options):  # type: ignore[override]
        _, contents, _ = save_state_dict_ret
        return writer, contents


_Row = tuple[str, Optional[tuple[int, ...]], Optional[int], int, str, int, int, Optional[list[str]]]
"""A `WriteResult`: a tensor's name, its offset in the whole and number among its chunks, bytes; its file's name, place
and length in that, transforms."""


@dataclass
class _Written:
    """What a writer tells its rank."""

    results: list[Any]
    """torch's records of where each tensor lies, for the table of contents."""
    sums: checksums.Sums
    error: str | None = None


@dataclass
class _Save:
    """A save under way, on one rank."""

    step: int
    unfinished: Path
    writer: FileSystemWriterAsync
    contents: Any
    """torch's `Metadata`; on rank 0."""
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    written: _Written | None = None
    gathered: bool = False
    """Rank 0 knows what all ranks have written."""
    closing: Future | None = None
    """On rank 0, in a thread: what has to be on the disk itself before the checkpoint has its name."""

    @property
    def waiting(self) -> bool:
        """Whether this rank has something to do that is not done."""
        return self.written is None or (self.closing is not None and not self.closing.done())


class CheckpointWriter:
    """Saves sharded states under `root`, keeping the newest `keep_last`.

    A checkpoint is written under another name and renamed when every rank is done, so that a run never
    finds half of one. One writer per rank is forked, from memory as it is at the call; saves that are not asynchronous
    wait for it. `poll` must be called on all ranks now and then (the loop does, every step), `finish` at the end.
    What cannot be written, on whichever rank, is told to `failed`, removed, and older checkpoints stay.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        asynchronous: bool,
        saved: Callable[[Path, float], None],
        failed: Callable[[int, str], None],
    ) -> None:
        self.root = root
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._saved = saved  # told on rank 0 when a checkpoint is whole, and for how many seconds training stood still
        self._failed = failed  # told on every rank the step and the reason
        self._save: _Save | None = None
        self._cleaner = ThreadPoolExecutor(1)  # deleting takes a file system seconds, and to be sure of a name
        self._cleaning: tuple[int, Future] | None = None  # after the save of this step; on rank 0
        self._whole = True
        self._stood_still, self._began = 0.0, 0.0
        self._rank = torch.distributed.get_rank()
        self._shares = WriteShares(_Plan(*_FORMAT, thread_count=1))
        # Megatron would start a manager process for this queue, which a killed rank leaves behind for good
        # (filesystem_async._get_write_results_queue); our results come through a pipe of our own.
        filesystem_async._results_queue = queue.Queue()

    def save(self, state: Callable[[], dict], step: int, fill: Callable[[list[ShardedTensor]], None]) -> None:
        """Begin to save `state()` as the checkpoint of `step`; `fill` gives the tensors to write here their values.

        Collective.
        """
        self.finish()  # one at a time: a second would only compete for the disk
        self._stood_still, self._whole = 0.0, False
        with self._standing_still():
            self._begin(state, step, fill)
        if not self.asynchronous:
            self.finish()

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[None]:
        start = time.perf_counter()
        self._began = start
        yield
        self._stood_still += time.perf_counter() - start

    def _begin(self, state: Callable[[], dict], step: int, fill: Callable[[list[ShardedTensor]], None]) -> None:
        unfinished = step_path(self.root, step).with_name(step_path(self.root, step).name + UNFINISHED)
        error = None
        if self._rank == 0:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            except OSError as reason:
                error = _in_words(reason, unfinished)
        if self._any_failed(step, error):
            return
        sharded, common = save_preprocess(state(), validate_access_integrity=False)  # `divide` does, where it must
        fill(self._shares.divide(sharded))
        writer, contents = megatron_versions.plan_of_save(_Plan(*_FORMAT, thread_count=1), sharded, unfinished)
        # From here on nothing depends on the state: on a GPU, copies; on a CPU, the fork's own memory.
        buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets) if writer.write_buckets else []
        to_write = (unfinished, writer.transforms, buckets, common if self._rank == 0 else None)
        # The writer shares pinned memory with us, which nothing else must be given before it is done.
        writer.write_buckets = buckets
        del sharded  # or the fork keeps the other ranks' shares of ZeRO-1's states
        ours, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_write_for_parent, args=(theirs, os.getpid(), *to_write), daemon=True)
        process.start()
        theirs.close()
        self._save = _Save(step, unfinished, writer, contents, process, ours)

    def poll(self) -> None:
        """Complete a save whose writers are done on all ranks. Collective while one is under way."""
        if self._save is None:
            return
        with self._standing_still():
            self._receive(0)
            waiting = torch.tensor([self._save.waiting], dtype=torch.int32, device=torch.cuda.current_device())
            torch.distributed.all_reduce(waiting)
            if waiting.item():
                return
            if self._save.gathered:
                self._complete()
            else:
                self._gather()

    def finish(self) -> bool:
        """Wait for the save under way, if any; whether the last one became a whole checkpoint. Collective."""
        if self._save is not None:
            with self._standing_still():
                if not self._save.gathered:
                    self._receive(None)
                    self._gather()
                self._complete()
        if self._cleaning is not None:
            (step, cleaning), self._cleaning = self._cleaning, None
            if reason := cleaning.exception():
                self._failed(step, f"it is saved, but older ones cannot be removed: {_in_words(reason, self.root)}")
        return self._whole

    def _receive(self, seconds: float | None) -> None:
        """Take what this rank's writer has to tell, if it is done within so many seconds."""
        save = self._save
        assert save is not None
        if save.written is not None:
            return
        done = save.pipe.poll(0 if seconds is None else seconds)
        before = None
        while not done and seconds is None:  # at the end of a run, or where a save meets the one before it
            if (now := _read_and_written(save.process)) != before:  # a disk that stands still is a hang
                heartbeat.mark("waiting for the checkpoint's writer")
            before, done = now, save.pipe.poll(1.0)
        if not done:
            return
        try:
            save.written = save.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # it was killed, maybe in the middle of a word
            save.process.join()
            save.written = _Written([], {}, f"its writer ended with exit code {save.process.exitcode}")
        save.process.join()
        save.pipe.close()

    def _gather(self) -> None:
        """All ranks have written or failed: rank 0 begins to put the table of contents beside it. Collective."""
        save = self._save
        assert save is not None
        assert save.written is not None
        if self._any_failed(save.step, save.written.error, save.unfinished):
            self._save = None
            return
        mine = [_row(result) for result in save.written.results], save.written.sums
        everyone = exchange(tuple[list[_Row], checksums.Sums], mine, only=0)
        save.gathered = True
        if everyone:  # a disk takes its time to say that it has something: not while training stands still
            save.closing = self._cleaner.submit(_close, save, everyone, step_path(self.root, save.step))

    def _complete(self) -> None:
        """The checkpoint has its name, or could not be given it. Collective."""
        save, self._save = self._save, None
        if save is None:
            return
        reason = save.closing.exception() if save.closing else None
        error = _in_words(reason, save.unfinished) if reason else None
        if self._any_failed(save.step, error, save.unfinished):
            return
        self._whole = True
        if self._rank:
            return
        self._cleaning = save.step, self._cleaner.submit(prune, self.root, self.keep_last)
        self._saved(step_path(self.root, save.step), self._stood_still + time.perf_counter() - self._began)

    def _any_failed(self, step: int, error: str | None, unfinished: Path | None = None) -> bool:
        """Whether any rank met an error: then all know, rank 0 removes what is there, and training goes on."""
        failed = torch.tensor([error is not None], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(failed)
        if not failed.item():
            return False
        errors = exchange(Optional[str], error and f"{error} on {platform.node()}")
        rank, reason = next((rank, text) for rank, text in enumerate(errors) if text)
        if unfinished is not None and self._rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._failed(step, f"rank {rank}: {reason}")
        return True


def _read_and_written(process: multiprocessing.process.BaseProcess) -> str:
    """What Linux has counted of a process's input and output; empty where it does not say."""
    try:
        return Path(f"/proc/{process.pid}/io").read_text()
    except OSError:
        return ""


def _write(directory: Path, transforms: Any, buckets: list, common: dict | None) -> _Written:
    """Write one rank's share of a checkpoint, and read it back for its checksums. Never raises for what a disk does."""
    written = _Written([], {})
    try:
        files = []
        for index, bucket in enumerate(buckets):
            results: queue.Queue = queue.Queue()
            counted: queue.Queue = queue.Queue()
            counted.put(index)
            FileSystemWriterAsync.write_preloaded_data([transforms], index, bucket, results, counted, use_fsync=True)
            _, outcome = results.get_nowait()
            if isinstance(outcome, Exception):
                raise outcome
            written.results += outcome
            files.append(Path(bucket[0]))
        if common is not None:
            path = directory / "common.pt"
            with path.open("wb") as stream:
                torch.save(common, stream)
                stream.flush()
                os.fsync(stream.fileno())
            files.append(path)
        written.sums = checksums.sums(files)
    except Exception as error:  # torch turns what the disk says into errors of several kinds
        written.error = _in_words(error, directory)
    return written


def _write_for_parent(pipe: Connection, parent: int, *to_write: Any) -> None:
    """In the forked writer."""
    die_with_parent(parent)
    pipe.send(_write(*to_write))
    pipe.close()


def _row(result: WriteResult) -> _Row:
    where, at = result.index, result.storage_data
    offset = None if where.offset is None else tuple(where.offset)
    transforms = None if at.transform_descriptors is None else list(at.transform_descriptors)
    return where.fqn, offset, where.index, result.size_in_bytes, at.relative_path, at.offset, at.length, transforms


def _result(row: _Row) -> WriteResult:
    name, offset, index, size, file, start, length, transforms = row
    return WriteResult(MetadataIndex(name, offset, index), size, _StorageInfo(file, start, length, transforms))


def _close(save: _Save, everyone: list[tuple[list[_Row], checksums.Sums]], final: Path) -> None:
    """Table of contents, format and checksums, and then the name; on rank 0."""
    save.writer.finish(save.contents, [[_result(row) for row in rows] for rows, _ in everyone])
    save_config(CheckpointingConfig(*_FORMAT), str(save.unfinished))
    known = {name: entry for _, sums in everyone for name, entry in sums.items()}
    known |= checksums.sums([save.unfinished / ".metadata", save.unfinished / "metadata.json"])
    checksums.write(save.unfinished, known)
    for name in ("metadata.json", checksums.NAME):  # writers and torch have done so with all else
        whole.sync(save.unfinished / name)
    finish(save.unfinished, final)


def _in_words(error: BaseException, where: Path) -> str:
    """What the disk said, if it said anything, with a file's name: torch puts errors of its own on top."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if cause.filename is None and cause.errno is not None:
        cause.filename = str(where)
    return " ".join(str(cause).split())
