"""Processes that `launch` starts: their environment, and one report of what goes wrong in them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsv3_train.errors import UserError
from dsv3_train.runtime import launch as launching
from dsv3_train.runtime import launcher
from dsv3_train.runtime.exits import PREEMPTED
from dsv3_train.runtime.launch import launch


def test_forked_ranks(tmp_path):
    def work() -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        (tmp_path / os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))

    launch(work, 3, "cpu")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [f"{r} {r} 3 127.0.0.1" for r in range(3)]


def test_a_fault_is_raised_once_and_ends_the_others():
    def work() -> None:
        if os.environ["RANK"] == "1":
            raise UserError("file: key: fix")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(UserError, match=r"^file: key: fix$"):
        launch(work, 2, "cpu")
    assert time.monotonic() - start < 20


def test_the_first_crash_is_shown_and_the_rest_counted(capfd):
    def work() -> None:
        rank = int(os.environ["RANK"])
        time.sleep(rank * 0.5)
        raise RuntimeError(f"reason {rank}")

    with pytest.raises(SystemExit) as stop:
        launch(work, 2, "cpu")
    assert stop.value.code == 1
    shown = capfd.readouterr().err
    assert "[rank 0] RuntimeError: reason 0" in shown
    assert "reason 1" not in shown
    assert "ranks 1 failed after it" in shown


def started_again(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`launch` as on a machine with two GPUs: the command line is started once per rank."""
    code = (
        f"import sys; sys.argv = ['dsv3', *{list(arguments)!r}]\n"
        "from dsv3_train.runtime.launch import launch\n"
        "launch(lambda: None, 2, 'cuda')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_ranks_started_again(tmp_path):
    done = started_again("recipes", "list", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"smoke"') == 2
    done = started_again("recipes", "show", "smokee", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("smokee") == 1  # both ranks met it


def test_ranks_started_again_end_with_a_killed_launcher(tmp_path):
    rank = tmp_path / "rank"
    rank.write_text('#!/bin/sh\necho $$ >"$RANK.tmp" && mv "$RANK.tmp" "$RANK.pid"\nexec sleep 600\n')
    rank.chmod(0o755)
    code = (
        "import sys\n"
        "from dsv3_train.runtime.launch import launch\n"
        "sys.executable = sys.argv[1]\n"
        "launch(lambda: None, 2, 'cuda')\n"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while len(pids := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(pid.read_text()) for pid in pids]
    assert [psutil.Process(pid).ppid() for pid in ranks] == [launcher.pid] * 2
    launcher.kill()
    launcher.wait()
    assert not list(temporary.iterdir())
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in ranks if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_the_moment_in_which_a_rank_ends(tmp_path, monkeypatch, number):
    """The other rank gets it, and time for its checkpoint: no error of the handler's ends it."""
    really = os.waitpid
    signals = iter([number])

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        ended = really(pid, options)
        if ended[0] and (due := next(signals, None)):
            signal.raise_signal(due)
        return ended

    def work() -> None:
        if os.environ["RANK"] == "0":
            while not (tmp_path / "ready").exists():
                time.sleep(0.01)
            return
        told = []
        signal.signal(number, lambda number, frame: told.append(number))
        (tmp_path / "ready").touch()
        while not told:
            time.sleep(0.01)
        time.sleep(0.3)
        (tmp_path / "saved").touch()

    monkeypatch.setattr(os, "waitpid", waitpid)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run where INT is ignored
    try:
        launch(work, 2, "cpu")
    finally:
        signal.signal(number, before)
    assert (tmp_path / "saved").exists()


def test_a_port_that_the_kernel_gives_to_nobody_else(monkeypatch):
    """Rank 0 takes it seconds later, when it has imported torch."""
    port = launching._free_port()
    assert port < 32768  # Linux's first of those
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(launching.random.SystemRandom, "sample", lambda _, ports, count: [port, port + 1])
        assert launching._free_port() == port + 1


def test_no_port_to_meet_at(monkeypatch):
    """torchrun --master-port=0 gives the ranks that 0, at which they waited for one another until a time-out."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_PORT.*--standalone"):
        launch(lambda: None, 4, "cuda")


STEP = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}


def test_steps_beside_each_other_meet_apart(monkeypatch, tmp_path):
    """Each on the first of its own nodes, and at a port of its own."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$3"\n')
    (tmp_path / "scontrol").chmod(0o755)
    met = []
    for step, node in (("0", "n0"), ("1", "n1")):
        environment = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
        environment |= {"SLURM_STEP_ID": step, "SLURM_STEP_NODELIST": node, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment)
            assert launcher.join().world_size == 2
        met.append((environment["MASTER_ADDR"], environment["MASTER_PORT"]))
    assert met == [("n0", "20041"), ("n1", "21050")]


def test_an_interactive_shell_is_no_step(monkeypatch):
    """As SLURM 22.05 sets them in the shell of `salloc -n2` with use_interactive_step."""
    shell = {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    monkeypatch.setattr(os, "environ", shell)
    assert launcher.join() is None


def test_srun_where_scontrol_is_not(monkeypatch, tmp_path):
    step = {**STEP, "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[0-1]", "PATH": str(tmp_path)}
    monkeypatch.setattr(os, "environ", step)
    with pytest.raises(UserError, match=r"MASTER_ADDR: not set, and scontrol .* first of n\[0-1\]"):
        launcher.join()


def test_asked_to_stop_before_there_is_anything_to_save():
    code = "from dsv3_train.runtime.signals import end_when_asked; end_when_asked(); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.terminate()
    assert process.wait(10) == PREEMPTED


def test_another_world_than_the_launcher(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"parallel\.world_size.*4.*8"):
        launch(lambda: None, 4, "cuda")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_is_not_ours_is_told_in_one_line(tmp_path, ranks):
    """On the command line, and in ranks that are not started again for it."""
    code = (
        "from dsv3_cli import main\n"
        "from dsv3_train.runtime.launch import launch\n"
        "def fail(): raise PermissionError(13, 'Permission denied', 'runs/theirs')\n"
        f"main.app = lambda **_: launch(fail, {ranks}, 'cpu')\n"
        "main.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    told = "runs/theirs: Permission denied; give another, or change its permissions\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_the_end_with_live_process_groups(tmp_path):
    """Not through the interpreter's end, where a thread of theirs can turn the exit code into SIGABRT's."""
    code = (
        "import atexit, torch\n"
        "from dsv3_cli import main\n"
        "from dsv3_train.errors import UserError\n"
        "def fail():\n"
        "    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)\n"
        "    print('some output', end='')\n"
        "    raise UserError('file: key: fix')\n"
        "atexit.register(print, 'the end of the interpreter')\n"
        "main.app = lambda **_: fail()\n"
        "main.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "some output", "file: key: fix\n")
