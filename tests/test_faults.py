"""What keeps a run alive, part by part; tools/chaos.py tries the whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsv3_train.checkpoint import checksums
from dsv3_train.errors import UserError
from dsv3_train.recipe.load import dump, load
from dsv3_train.runtime import heartbeat, incidents
from dsv3_train.runtime.exits import HUNG, PREEMPTED
from dsv3_train.runtime.heartbeat import Beat
from dsv3_train.runtime.launch import ATTEMPT, Restarts, launch
from dsv3_train.runtime.watchdog import Watchdog, blame
from dsv3_train.training import rundir
from dsv3_train.training.machine import told_when_full
from dsv3_train.training.skips import Skip, Skips
from dsv3_train.training.spikes import Spikes


def restarts(run_dir: Path, limit: int, progress=lambda: None) -> Restarts:
    return Restarts(limit, run_dir, progress)


def test_a_killed_rank_is_named_and_all_are_started_again(tmp_path, capfd):
    def work() -> None:
        beat = heartbeat.start(tmp_path / "heartbeats", int(os.environ["RANK"]))
        beat.mark("forward of micro-batch 3", step=17)
        (tmp_path / f"{os.environ['RANK']}-{os.environ[ATTEMPT]}").touch()
        if os.environ["RANK"] == "1" and os.environ[ATTEMPT] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)

    launch(work, 3, "cpu", restarts(tmp_path, 1))
    assert all((tmp_path / f"{rank}-1").exists() for rank in range(3))
    told = capfd.readouterr().err
    assert "rank 1 was ended by SIGKILL" in told
    assert "step 17, forward of micro-batch 3" in told
    (incident,) = incidents.read(tmp_path)
    assert (incident["kind"], incident["rank"], incident["step"]) == ("death", 1, 17)


def test_failures_in_a_row_are_limited_but_progress_is_not_a_failure(tmp_path, capfd):
    def work() -> None:
        (tmp_path / os.environ[ATTEMPT]).touch()
        if int(os.environ[ATTEMPT]) < 3:  # gets on three times, then never again
            (tmp_path / "checkpoint").write_text(os.environ[ATTEMPT])
        raise SystemExit(7)

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(SystemExit) as stop:
        launch(work, 1, "cpu", restarts(tmp_path, 2, lambda: checkpoint.exists() and checkpoint.read_text()))
    assert stop.value.code == 7
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["0", "1", "2", "3", "4"]
    assert "3 failures in a row without a new checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("error", [UserError("file: key: fix"), SystemExit(PREEMPTED)])
def test_not_started_again(tmp_path, error):
    def work() -> None:
        (tmp_path / os.environ[ATTEMPT]).touch()
        raise error

    with pytest.raises(type(error)):
        launch(work, 1, "cpu", restarts(tmp_path, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_rank_that_fails_in_its_last_words_leaves_the_launcher_alone(tmp_path):
    """A forked rank never runs the launcher's own cleaning up, which once deleted what that still needed."""

    class Raises:
        def __getattr__(self, name):
            raise RuntimeError("a handler of a signal, say")

    def work() -> None:
        (tmp_path / os.environ[ATTEMPT]).touch()
        if os.environ[ATTEMPT] == "0":
            sys.stdout = Raises()  # flushed at the end

    launch(work, 2, "cpu", restarts(tmp_path, 1))
    assert (tmp_path / "1").exists()


def test_no_process_is_left(tmp_path):
    """A killed rank's own children (writers, data workers) end with it."""

    def work() -> None:
        if os.environ["RANK"] == "0":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (tmp_path / "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)

    with pytest.raises(SystemExit):
        launch(work, 2, "cpu")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


@contextlib.contextmanager
def holder(run_dir: Path, then: Callable[[], None] = lambda: time.sleep(60)):
    """Another process that holds a run directory and goes on to `then`; its id."""

    def work() -> None:
        rundir.hold(run_dir)
        (run_dir / "held").touch()
        then()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while process.is_alive() and not (run_dir / "held").exists():
        time.sleep(0.01)
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_two_runs_keep_out_of_one_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "_LOCK_SECONDS", 0.3)
    recipe = load("smoke")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    (tmp_path / "state").write_text("running\n")
    with holder(tmp_path) as pid:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError) as refused:
            rundir.open_run_dir(tmp_path, load("smoke", ["optim.eps=1e-7"]), "", {})
        rundir.write_state(tmp_path, "refused")  # as the second run's last word
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert str(refused.value) == (
        f"{tmp_path}: in use by process {pid} on {platform.node()}; set another runtime.run_dir, or stop that run"
    )
    rundir.write_state(tmp_path, "failed")
    assert (tmp_path / "state").read_text() == "failed\n"


def test_a_run_directory_is_free_again(tmp_path):
    """Once its run has ended, even a moment later, and whatever that run's own processes still do."""

    def leave_a_child() -> None:
        if child := os.fork():
            (tmp_path / "one" / "child").write_text(str(child))
        else:
            time.sleep(60)

    with holder(tmp_path / "one", leave_a_child), holder(tmp_path / "two", lambda: time.sleep(1)):
        while not (child := tmp_path / "one" / "child").exists() or not child.read_text():
            time.sleep(0.01)
        for name in ("one", "two"):
            for _ in range(2):  # and one process may open it again
                rundir.hold(tmp_path / name)
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (note,) = rundir.open_run_dir(tmp_path, load("smoke"), "", {})
    assert note == f"{tmp_path}: its file system has no locks (No locks available): a second run here would not be told"


def test_hang_is_ended_and_the_rank_named(tmp_path, capfd):
    """Two ranks wait for the third, which is busy elsewhere."""

    def work() -> None:
        rank = int(os.environ["RANK"])
        beat = heartbeat.start(tmp_path / "heartbeats", rank)
        watchdog = Watchdog(beat, tmp_path, 3, limit=2.0)
        watchdog.start()
        beat.mark("forward", step=5)
        if rank == 2:
            busy_elsewhere()
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=rank, world_size=3)

    def busy_elsewhere() -> None:
        time.sleep(60)

    import torch.distributed  # noqa: F401  before forking

    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        launch(work, 3, "cpu", None)
    assert stop.value.code == HUNG
    assert time.monotonic() - start < 15
    told = capfd.readouterr().err
    assert "no progress for 2 s: rank 2 on " in told
    assert "step 5, forward, at busy_elsewhere (tests/test_faults.py:" in told
    assert "busy_elsewhere" in (tmp_path / "hangs" / "2.txt").read_text()
    assert [incident["kind"] for incident in incidents.read(tmp_path)] == ["hang"]  # told once, whoever was first


def beat(rank: int, **changes) -> Beat:
    base = {"host": f"n{rank // 2}", "process": 1, "step": 9, "operation": "forward", "marks": 50, "since": 100.0}
    return Beat(rank, **{**base, "alive": 160.0, "waiting": True, "where": "all_reduce", **changes})


def test_blame():
    """A silent process before a busy one, before one that is behind."""
    four = {rank: beat(rank) for rank in range(4)}
    text = blame({**four, 0: beat(0, alive=120.0), 1: beat(1, waiting=False)}, 161.0, 5.0)
    assert text.split(" gave")[0] == "rank 0 on n0 (process 1), step 9, forward"
    assert "no sign of life for 41 s" in text.replace("gave ", "")
    text = blame({**four, 3: beat(3, waiting=False, where="read (data.py:7)")}, 161.0, 5.0)
    assert text == "rank 3 on n1 (process 1), step 9, forward, at read (data.py:7) for 61 s"
    assert blame({**four, 2: beat(2, marks=49)}, 161.0, 5.0).startswith("rank 2 on n1")
    assert blame({**four, 2: None}, 161.0, 5.0) == "rank 2 never began to train"


SIGNALLED = """
import sys, time
from dsv3_train.runtime.signals import StopRequest
stop = StopRequest()
if sys.argv[1] == "heed":
    stop.heed()
print("ready", flush=True)
while stop.name is None:
    time.sleep(0.01)
print(stop.name, flush=True)
time.sleep(60)
"""


def test_signals():
    def start(heed: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SIGNALLED, heed]
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where this shell ignores it
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
        assert process.stdout.readline() == "ready\n"
        return process

    before = start("no")
    before.send_signal(signal.SIGTERM)
    assert before.wait(10) == PREEMPTED  # nothing to save yet
    process = start("heed")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # by the launcher as well, at the same moment: one wish
    assert process.stdout.readline() in ("SIGUSR1\n", "SIGTERM\n")
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # at the limit, as at the lead time before it: SLURM is not impatient
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT


def test_a_file_system_that_fails_ends_no_heartbeat(tmp_path, monkeypatch):
    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    beat = heartbeat.Heartbeat(tmp_path, 0)
    beat.mark("forward", 3)
    beat.beat(True, "here")
    assert heartbeat.read(tmp_path / "0").operation == "forward"


def test_signals_of_a_terminal():
    """Ctrl-C and a closed terminal are the same wish; not for a process that is to outlive it (nohup)."""

    @contextlib.contextmanager
    def started(*before: str) -> Iterator[subprocess.Popen]:
        command = [*before, sys.executable, "-c", SIGNALLED, "heed"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen(command, **pipes, preexec_fn=at_a_terminal) as process:
            assert process.stdout.readline() == "ready\n"
            yield process
            process.kill()

    def at_a_terminal() -> None:  # wherever these tests run
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGHUP):
        with started() as process:
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.name}\n"
    with started("nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"


def test_spikes():
    losses = [5.0 - 0.01 * step + 0.02 * (-1) ** step for step in range(40)]
    spikes = Spikes(8.0, 16)
    assert not any(spikes.add(loss) for loss in losses)
    assert not spikes.add(math.nan)
    assert spikes.add(6.0)
    assert 6.0 not in spikes.losses  # one spike must not hide the next
    assert spikes.add(6.0)
    assert not spikes.add(4.6)
    again = Spikes(8.0, 16, list(spikes.losses))
    assert again.score(6.0) == spikes.score(6.0) > 8
    spikes.take(6.0)  # unless it is trained on all the same
    assert spikes.losses[-1] == 6.0
    flat = Spikes(8.0, 16, [2.0] * 16)
    assert not flat.add(2.0001)
    assert not Spikes(None, 16, [2.0] * 16).add(100.0)
    assert not Spikes(8.0, 16, [2.0] * 5).add(100.0)  # too few to judge by


def test_skips(tmp_path):
    skips = Skips(tmp_path, ["40-47"])
    assert [skips.covers(first, 8) for first in (24, 32, 36, 40, 47, 48)] == [False, False, True, True, True, False]
    skips.add(Skip(64, 79, "spike", 9, 7.5), write=True)
    again = Skips(tmp_path, [])
    assert [(skip.first, skip.last, skip.reason) for skip in again.all] == [(64, 79, "spike")]
    assert again.rollbacks() == 1
    assert skips.before(64) == [[40, 47]]
    assert skips.before(65) == [[40, 47], [64, 79]]

    def common(consumed: int, *known: list[int]) -> dict:
        return {"position": {"consumed_samples": consumed}, "guarded": {"skipped": list(known)}}

    assert again.against(common(64)) is None
    assert "64-79 (spike)" in again.against(common(72))
    assert again.against(common(80, [64, 79])) is None
    assert "80-87" in again.against(common(88, [64, 79]), Skip(80, 87, "spike"))
    (tmp_path / "skips.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"skips\.jsonl:1"):
        Skips(tmp_path, [])


def test_checksums(tmp_path):
    files = {name: os.urandom(1000) for name in ("a", "b", "c")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    checksums.write(tmp_path, checksums.sums(tmp_path / name for name in files))
    assert checksums.fault(tmp_path) is None
    (tmp_path / "b").write_bytes(files["b"][:-1] + bytes([files["b"][-1] ^ 1]))
    assert checksums.fault(tmp_path).startswith("b: its SHA-256")
    # Each of three ranks reads a third.
    assert [checksums.fault(tmp_path, (rank, 3)) is None for rank in range(3)] == [True, False, True]
    (tmp_path / "b").write_bytes(files["b"][:500])
    assert checksums.fault(tmp_path) == "b: 500 bytes, 1000 were written"
    (tmp_path / "b").unlink()
    assert checksums.fault(tmp_path) == "b: missing"
    (tmp_path / checksums.NAME).write_text(json.dumps({"sha256": [1]}))
    assert checksums.fault(tmp_path).startswith("manifest.json: not a manifest")


def test_why_saves_do_not_go_through_megatron():
    """What checkpoint/save.py is there to avoid; where this fails, Megatron's own way may do."""
    import inspect

    from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver

    assert "Manager()" in inspect.getsource(filesystem_async._get_write_results_queue)
    finalize = inspect.getsource(state_dict_saver.save_state_dict_async_finalize)
    written, told = finalize.index("storage_writer.finish"), finalize.index("distributed.broadcast(")
    assert written < told  # rank 0 fails to write the table of contents ...
    assert "try:" not in finalize  # ... and the others wait for its word for ever


def test_a_full_gpu_is_refused_unless_a_step_has_fitted():
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.06 GiB is "
        "free. Of the allocated memory 137.00 GiB is allocated by PyTorch. See documentation for Memory Management"
    )
    recipe = load("dsv3_tiny", ["training.recompute=[moe_act]"])
    with pytest.raises(UserError) as told, told_when_full(recipe):
        raise full
    assert str(told.value) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.06 GiB is "
        "free. To ask for less: training.micro_batch_size=1, training.recompute=[moe_act, layernorm, mla_up_proj], "
        "more of parallel.pipeline or parallel.expert (dsv3 train ... --dry-run counts it)"
    )
    with pytest.raises(torch.OutOfMemoryError), told_when_full(recipe, lambda: True):
        raise full
