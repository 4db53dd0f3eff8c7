"""Messages between pipeline ranks: kept apart, and in the order that both ends mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dsv3_train.pipeline.operations import Message, Transfer
from dsv3_train.runtime import distributed
from parity import in_processes

SHAPE = (2, 1, 3)


def exchange(checked: bool, expected: tuple[int, int], out) -> None:
    """Rank 0 sends micro-batches 0 and 1, filled with their numbers; rank 1 takes the first two as `expected`."""
    from dsv3_train.pipeline.messages import Messages

    dist.init_process_group("gloo")
    up, down = dist.new_group([0, 1]), dist.new_group([0, 1])
    messages = Messages(up, down, torch.float32, headers=False, checked=checked)
    sends = dist.get_rank() == 0
    for micro_batch in (0, 1) if sends else expected:
        message = Message("F", 0, 0, micro_batch)
        outgoing = {message: torch.full(SHAPE, float(micro_batch))} if sends else {}
        messages.post([Transfer(sends, 1 - dist.get_rank(), message)], outgoing, SHAPE)
    if not sends:
        torch.save({m: messages.take(Message("F", 0, 0, m)) for m in (0, 1)}, out)
    messages.finish()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _cpu():
    distributed.prepare_import("cpu")


@pytest.mark.parametrize("checked", [True, False])
def test_each_arrives_as_itself(tmp_path, checked):
    in_processes(lambda: exchange(checked, (0, 1), tmp_path / "got"), 2)
    got = torch.load(tmp_path / "got")
    assert all(torch.equal(got[m], torch.full(SHAPE, float(m))) for m in (0, 1))


def test_another_order_swaps_them_silently_unless_checked(tmp_path, capfd):
    in_processes(lambda: exchange(False, (1, 0), tmp_path / "got"), 2)
    assert torch.equal(torch.load(tmp_path / "got")[0], torch.ones(SHAPE))
    with pytest.raises(SystemExit):
        in_processes(lambda: exchange(True, (1, 0), tmp_path / "never"), 2)
    said = capfd.readouterr().err
    assert "expected Message(kind='F', direction=0, stage=0, micro_batch=1) from rank 0, got" in said
    assert not (tmp_path / "never").exists()


def test_shapes_travel_before_tensors(tmp_path):
    def work() -> None:
        from dsv3_train.pipeline.messages import Messages

        dist.init_process_group("gloo")
        up, down = dist.new_group([0, 1]), dist.new_group([0, 1])
        messages = Messages(up, down, torch.float32, headers=True, checked=False)
        message = Message("B", 1, 2, 5)
        sends = dist.get_rank() == 1
        messages.post(
            [Transfer(sends, 1 - dist.get_rank(), message)], {message: torch.ones(7, 1, 3)} if sends else {}, SHAPE
        )
        if not sends:
            torch.save(messages.take(message), tmp_path / "got")
        messages.finish()
        dist.destroy_process_group()

    in_processes(work, 2)
    assert torch.load(tmp_path / "got").shape == (7, 1, 3)
