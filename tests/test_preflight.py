"""Pre-flight: who is missing, different, broken or slow is named."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv3_train.errors import UserError
from dsv3_train.runtime import preflight, preflight_run
from dsv3_train.runtime.exits import HUNG
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.preflight import Measurement, different, gpu_faults, node_faults, slow
from dsv3_train.runtime.rendezvous import Presence, differences, meet


def here(**facts) -> Presence:
    return Presence(int(os.environ["RANK"]), **facts)


def test_missing_rank_is_named():
    def work() -> None:
        if os.environ["RANK"] == "2":
            return
        meet(here(host="n0"), seconds=2, per_node=2)

    start = time.monotonic()
    with pytest.raises(UserError, match=r"within 2 s .*rank 2 \(number 0 of node 1\) did not appear; here are n0$"):
        launch(work, 4, "cpu")
    assert time.monotonic() - start < 15


def test_one_process_meets_again():
    """As a comparison of two models in one process does."""

    def work() -> None:
        for _ in range(2):
            store, _, _ = meet(here(host="n0"), seconds=20, per_node=2)
            store.set(f"left/{os.environ['RANK']}", "")
            store.wait(["left/0", "left/1"])

    launch(work, 2, "cpu")


def test_missing_rank_0_is_named():
    def work() -> None:
        if os.environ["RANK"] == "0":
            return
        meet(here(host="n1"), seconds=2, per_node=2)

    with pytest.raises(UserError, match=r"rank 1 on n1: no word from rank 0 at 127\.0\.0\.1:\d+ within 2 s"):
        launch(work, 2, "cpu")


def test_wrong_version_on_one_rank_is_named():
    def work() -> None:
        torch = "2.9.0" if os.environ["RANK"] == "1" else "2.13.0"
        meet(here(host="n0", versions={"torch": torch, "python": "3.11"}), seconds=20, per_node=4)

    with pytest.raises(UserError, match=r"^rank 1 on n0: torch is 2\.9\.0, and 2\.13\.0 on the other ranks"):
        launch(work, 3, "cpu")


@pytest.mark.parametrize("preflight", [True, False])
def test_another_recipe_on_one_node_is_named(tmp_path, preflight):
    """Nodes that were started by hand, one with an override that the others lack."""
    from parity import tiny

    def work() -> None:
        rank = int(os.environ["RANK"])
        one = tiny(faults={"preflight": preflight, "join_seconds": 20}, parallel={"world_size": 3, "gpus_per_node": 1})
        optim = one.optim.model_copy(update={"beta2": 0.9} if rank == 2 else {})
        os.environ["LOCAL_RANK"] = "0"
        preflight_run.join(one.model_copy(update={"optim": optim}), "cpu", tmp_path)

    named = r"^rank 2 on \S+: optim.beta2 is 0.9, and 0.95 on the other ranks; start all nodes with the same recipe"
    with pytest.raises(UserError, match=named):
        launch(work, 3, "cpu")


def test_broken_node_is_named(tmp_path):
    def work() -> None:
        faults = ["no room"] if os.environ["RANK"] == "1" else []
        meet(here(host="n" + os.environ["RANK"], faults=faults), seconds=20, per_node=1)

    with pytest.raises(UserError, match=r"^rank 1 on n1: no room$"):
        launch(work, 2, "cpu")


@pytest.mark.parametrize(("hard", "message"), [(100, r"may have 100 files open \(ulimit -Hn\).* up to 514"), (600, "")])
def test_a_limit_of_open_files_is_raised_or_told(hard, message):
    """A rank 0 of 2048 keeps a connection to each."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
        store, _, _ = meet(here(host="n0"), seconds=20, per_node=2)
        store.set(f"left/{os.environ['RANK']}", "")
        if os.environ["RANK"] == "0":
            store.wait(["left/1"])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (514, hard)

    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        launch(work, 2, "cpu")


def test_a_version_that_only_one_rank_has():
    everyone = [Presence(rank, "h", {"torch": "1", **({"nccl": "2"} if rank < 2 else {})}) for rank in range(3)]
    assert [line.split(";")[0] for line in differences(everyone)] == [
        "rank 2 on h: nccl is missing, and 2 on the other ranks"
    ]


def test_node_faults(tmp_path, monkeypatch):
    from parity import tiny

    assert node_faults(tiny(), "cpu", tmp_path / "not" / "yet") == []
    monkeypatch.setattr(preflight, "_nvidia_smi", lambda: "")
    missing = node_faults(tiny(parallel={"world_size": 4, "gpus_per_node": 4}), "cuda", tmp_path)
    assert missing == ["0 GPUs that torch can use, 4 are needed"]
    assert gpu_faults("0, 0, Not Active\n1, 3, Not Active\n2, [N/A], Active\n") == [
        "GPU 1 has had 3 uncorrected memory errors; reset or replace it",
        "GPU 2 is slowed down by its hardware (heat or power)",
    ]


def measured(rank: int, **changes) -> Measurement:
    base = {"gemm_tflops": 600.0, "product": 5, "all_reduce": 0.01, "all_to_all": 0.01, "pipeline": 0.01}
    group = [rank // 2 * 2, rank // 2 * 2 + 1]
    return Measurement(rank, f"n{rank // 2}", expert_group=group, next_stage=(rank + 2) % 8, **{**base, **changes})


def test_slow_ones_among_many():
    assert slow([measured(rank) for rank in range(8)], 1.5) == []
    gemm = [measured(rank, **({"gemm_tflops": 350.0} if rank == 5 else {})) for rank in range(8)]
    assert slow(gemm, 1.5) == ["rank 5 on n2: matrix products at 350 TFLOPS, 600 are usual here"]
    group = [measured(rank, **({"all_to_all": 0.03} if rank in (2, 3) else {})) for rank in range(8)]
    assert slow(group, 1.5) == [
        "expert-parallel group of ranks 2 and 3 on n1: all-to-all takes 30.0 ms, 10.0 are usual here"
    ]
    link = [measured(rank, **({"pipeline": 0.05} if rank == 6 else {})) for rank in range(8)]
    assert slow(link, 1.5) == ["from rank 6 on n3 to rank 0: a message takes 50.0 ms, 10.0 are usual here"]


def test_who_computes_otherwise():
    assert different([measured(rank) for rank in range(8)]) == []
    wrong = [measured(rank, product=4 if rank in (0, 6) else 5) for rank in range(8)]
    assert different(wrong) == [
        "rank 0 on n0: a matrix product has other bits than on rank 1 on n0",
        "rank 6 on n3: a matrix product has other bits than on rank 1 on n0",
    ]


def one_bit_wrong(device: str, square=preflight._square) -> torch.Tensor:
    a = square(device)
    a.view(torch.int32)[200, 100] ^= 1 << 20
    return a


def twenty_times_slower(device: str, fast=preflight.gemm_tflops, least=preflight._least) -> float:
    preflight._least = lambda device, work, times: least(device, lambda: [work() for _ in range(20)], times)
    try:
        return fast(device)
    finally:
        preflight._least = least


def four_with_a_slow_one(folder: Path) -> None:
    """Four processes in the groups of a run; on one of them products take twenty times as long, another's are wrong."""
    from dsv3_train.runtime import distributed
    from parity import tiny

    distributed.prepare_import("cpu")
    parallel = {"world_size": 4, "pipeline": 2, "expert": 2}
    recipe = tiny(parallel=parallel, pipeline={"layout": "Ett|ttmL"}, faults={"join_seconds": 60.0, "slow_factor": 5.0})

    def work() -> None:
        if os.environ["RANK"] == "2":
            preflight.gemm_tflops = twenty_times_slower
        if os.environ["RANK"] == "1":
            preflight._square = one_bit_wrong
        found = preflight_run.join(recipe, "cpu", folder)
        (folder / os.environ["RANK"]).write_text("\n".join(found))
        distributed.stop()

    launch(work, 4, "cpu")


def two_of_which_one_hangs(folder: Path) -> None:
    """The second never gets to the all-reduce."""
    from dsv3_train.runtime import distributed
    from parity import tiny

    distributed.prepare_import("cpu")
    recipe = tiny(parallel={"world_size": 2}, faults={"join_seconds": 60.0, "hang_seconds": 3.0})

    def work() -> None:
        if os.environ["RANK"] == "1":
            preflight.gemm_tflops = lambda device: time.sleep(600)
        preflight_run.join(recipe, "cpu", folder)

    launch(work, 2, "cpu")


def in_a_process(function: str, folder: Path) -> subprocess.CompletedProcess:
    """Not in this one: where there were process groups before, Megatron's globals hold some whose threads a fork does
    not have, and freeing them crashes it."""
    script = f"import pathlib, test_preflight; test_preflight.{function}(pathlib.Path({str(folder)!r}))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here / "distributed"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)


def test_a_hang_is_ended_and_the_rank_named(tmp_path):
    done = in_a_process("two_of_which_one_hangs", tmp_path)
    assert done.returncode == HUNG, done.stderr
    assert "no progress for 3 s: rank 1 on " in done.stderr
    assert "pre-flight: matrix products" in done.stderr
    assert (tmp_path / "hangs" / "1.txt").is_file()


def test_slow_and_wrong_ranks_are_named(tmp_path):
    done = in_a_process("four_with_a_slow_one", tmp_path)
    assert done.returncode == 0, done.stderr
    told = [Path(tmp_path / str(rank)).read_text() for rank in range(4)]
    wrong, slowed = told[0].splitlines()
    assert wrong.startswith("pre-flight: rank 1 on "), told
    assert "a matrix product has other bits than on rank 0" in wrong
    assert slowed.startswith("pre-flight: rank 2 on "), told
    assert "matrix products" in slowed
    assert len(set(told)) == 1
