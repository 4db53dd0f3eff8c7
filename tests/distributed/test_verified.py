"""A checkpoint is condemned for what is in it, not for what one machine reads of it; a slow save is not a hang."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_train.checkpoint import checksums
from dsv3_train.runtime import distributed, heartbeat
from dsv3_train.runtime.launch import launch
from parity import in_processes, tiny


def wrong(file: Path) -> str:
    return "0"


def failing(file: Path) -> str:
    raise OSError(errno.EIO, "Input/output error", str(file))


@pytest.mark.parametrize(
    ("damaged", "reads_as", "said"),
    [
        (True, None, "b: its SHA-256 is not the one of what was written"),
        (False, wrong, "Absent: {path}: rank 1 on {host} finds b: its SHA-256"),
        (False, failing, "Absent: rank 1 on {host} cannot read {path}/b (Input/output error): nothing is wrong"),
        (False, None, "None"),
    ],
    ids=["a wrong file", "a rank that reads wrongly", "a rank that cannot read", "whole"],
)
def test_verdict_of_two_ranks(tmp_path, damaged, reads_as: Callable[[Path], str] | None, said):
    distributed.prepare_import("cpu")
    from dsv3_train.checkpoint.load import _verified  # before forking

    path = tmp_path / "step_00000001"
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(name)
    checksums.write(path, checksums.sums([path / "a", path / "b"]))
    if damaged:
        (path / "b").write_text("c")

    def on_rank() -> None:
        import platform

        import torch

        distributed.start(tiny(parallel={"world_size": 2}), "cpu")
        rank = torch.distributed.get_rank()
        if rank == 1 and reads_as is not None:
            checksums._sha256 = reads_as
        try:
            text = str(_verified(path))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        (tmp_path / str(rank)).write_text(text.replace(platform.node(), "HOST"))
        distributed.stop()

    launch(on_rank, 2, "cpu")
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(said.format(path=path, host="HOST"))


def test_a_save_that_training_waits_for_is_no_hang(tmp_path):
    """A disk that writes on, slowly: heartbeats go on too; and the checkpoint is whole when `save` returns."""
    distributed.prepare_import("cpu")
    from dsv3_train.checkpoint import save  # before forking

    def slowly(directory: Path, *to_write, write=save._write):
        for second in range(3):
            (directory.parent / "slow").write_text(str(second))
            time.sleep(1)
        return write(directory, *to_write)

    def work() -> None:
        import torch
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        distributed.start(tiny(parallel={"world_size": 2}), "cpu")
        rank = torch.distributed.get_rank()
        beat, save._write = heartbeat.start(tmp_path / "heartbeats", rank), slowly
        saved: list[Path] = []
        checkpoints = save.CheckpointWriter(tmp_path / "all", 1, False, lambda path, _: saved.append(path), print)
        tensor = ShardedTensor.from_rank_offsets("x", torch.arange(4.0), (0, rank, 2))
        checkpoints.save(lambda: {"x": tensor, "position": {"step": 1}}, 1, lambda tensors: None)
        (tmp_path / str(rank)).write_text(f"{beat.marks > 2} {[path.name for path in saved]}")
        distributed.stop()

    launch(work, 2, "cpu")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True ['step_00000001']", "True []"]
    assert checksums.fault(tmp_path / "all" / "step_00000001") is None


def test_training_does_not_wait_for_old_checkpoints_to_be_deleted(tmp_path):
    """What cannot be deleted is told when the next save begins, and costs no checkpoint."""
    distributed.prepare_import("cpu")
    from dsv3_train.checkpoint import save

    def slow_and_failing(root: Path, keep_last: int) -> None:
        time.sleep(2)
        raise OSError(5, "Input/output error")

    def work() -> None:
        save.prune = slow_and_failing
        distributed.start(tiny(), "cpu")
        said: list[str] = []
        checkpoints = save.CheckpointWriter(
            tmp_path / "all",
            1,
            True,
            lambda path, seconds: said.append(f"{path.name} {seconds < 1.5}"),
            lambda step, reason: said.append(f"{step}: {reason}"),
        )
        for step in (1, 2):
            checkpoints.save(lambda step=step: {"position": {"step": step}}, step, lambda tensors: None)
            while checkpoints._save is not None:
                time.sleep(0.05)  # training
                checkpoints.poll()
        said.append(f"whole: {checkpoints.finish()}")
        (tmp_path / "said").write_text("\n".join(said))
        distributed.stop()

    in_processes(work, 1)
    failed = f"it is saved, but older ones cannot be removed: [Errno 5] Input/output error: '{tmp_path / 'all'}'"
    assert (tmp_path / "said").read_text().splitlines() == [
        *("step_00000001 True", f"1: {failed}"),
        *("step_00000002 True", f"2: {failed}", "whole: True"),
    ]
