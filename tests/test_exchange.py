"""What ranks tell one another in JSON."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import psutil
import pytest
import torch
import torch.distributed as dist

from dsv3_train.errors import UserError
from dsv3_train.runtime import network
from dsv3_train.runtime.exchange import exchange
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.launcher import MEETING
from dsv3_train.runtime.rendezvous import Presence, meet


@dataclass(frozen=True)
class Fact:
    rank: int
    seconds: float
    where: Path
    words: list[tuple[str, Optional[int]]]


def fact(rank: int) -> Fact:
    return Fact(
        rank, float("inf") if rank else 0.1, Path(f"runs/é {rank}"), [("x" * 1000 * rank, None), ("\x00", rank)]
    )


def joined() -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = meet(Presence(rank), 60.0, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return rank


def test_everyone_one_and_for_one():
    def work() -> None:
        rank = joined()
        assert exchange(Fact, fact(rank)) == [fact(0), fact(1), fact(2)]
        assert exchange(Fact, fact(rank), only=2) == ([fact(0), fact(1), fact(2)] if rank == 2 else [])
        assert exchange(Optional[Fact], fact(1) if rank == 1 else None, source=1) == [fact(1)]
        pair = dist.new_group([1, 2])
        if rank:
            assert exchange(int, 10 * rank, pair) == [10, 20]
            assert exchange(int, 10 * rank, pair, source=2) == [20]
        assert exchange(str, "") == ["", "", ""]

    launch(work, 3, "cpu")


def test_one_machine_listens_on_loopback_alone(monkeypatch):
    """The store too; and its keys stand under a word that differs from start to start."""
    for name in network.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def work() -> None:
        rank = joined()
        words = exchange(str, os.environ[MEETING])
        assert len(set(words)) == 1
        assert len(words[0]) == 32
        dist.new_group([0, 1])
        connections = psutil.Process().net_connections()
        listening = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        ports = {address.port for address in listening}
        assert (int(os.environ["MASTER_PORT"]) in ports) == (rank == 0)
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, False)
        came = [key for key in store.list_keys() if key.endswith(("here/0", "here/1"))]
        assert [key.split("/")[:2] for key in came] == [["dsv3", words[0]]] * 2
        dist.barrier()

    launch(work, 2, "cpu")


@pytest.mark.parametrize("sent", ["pickle", "brackets", "another type"])
def test_what_is_no_json_of_that_type(tmp_path, sent):
    """A rank that sends a pickle is refused: nothing of it runs."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    texts = {"pickle": pickle.dumps(Evil()), "brackets": b"[" * 100_000, "another type": b'["rank", 1]'}

    def send(text: bytes) -> None:
        """As `exchange`, without its JSON."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = int(torch.cat(lengths).max())
        padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8)
        dist.all_gather([torch.empty_like(padded) for _ in range(2)], padded)

    def work() -> None:
        if joined() == 1:
            send(texts[sent])
        else:
            exchange(Fact, fact(0))

    with pytest.raises(UserError, match=r"^rank 1: what it sent is not what this rank expects"):
        launch(work, 2, "cpu")
    assert not (tmp_path / "ran").exists()


def test_nobody_sends_pickles():
    """torch's own collectives of objects unpickle what comes."""
    root = Path(__file__).parents[1]
    names = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list")
    for folder in ("dsv3_train", "cli", "tools"):
        for file in (root / folder).rglob("*.py"):
            used = [name for name in names if f"{name}(" in file.read_text(encoding="utf-8")]
            assert not used, (file, used)
