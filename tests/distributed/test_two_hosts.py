"""Two hosts, as network namespaces of this machine: each believes, as Debian's /etc/hosts says, that its own name is
127.0.1.1. Needs root and iproute2; skipped elsewhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dsv3_train.runtime import distributed, heartbeat, network, rendezvous
from dsv3_train.runtime.exits import HUNG
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.watchdog import Watchdog
from parity import tiny, train

NAMES = json.loads(os.environ.get("TWO_HOSTS", "[]")) or [f"dsv3-{os.getpid()}-{host}" for host in "ab"]
LAYOUT = tiny(
    parallel={"world_size": 4, "gpus_per_node": 2, "pipeline": 2, "expert": 2},
    pipeline={"layout": "Ett|ttmL"},
    faults={"join_seconds": 60.0},
)
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_NAME, _NEW_NETWORK = 0x20000, 0x4000000, 0x40000000  # sched.h
_BIND, _PRIVATE = 4096, 0x44000  # sys/mount.h; with all below it


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Path]:
    """Two hosts joined by a cable; the folder that holds their /etc/hosts."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    folder = tmp_path_factory.mktemp("hosts")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "cable-b", "netns", NAMES[1])
        for number, name in enumerate(NAMES):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", f"cable-{'ab'[number]}")
            ip("-n", name, "link", "set", f"cable-{'ab'[number]}", "up")
            others = f"10.77.0.{2 - number} {NAMES[1 - number]}\n"
            (folder / name).write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    else:
        yield folder
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def be_on_host(folder: Path) -> None:
    """Move this rank to its host, and tell it of the launcher what it would be told there."""
    name = NAMES[int(os.environ["RANK"]) // 2]
    with open(f"/run/netns/{name}") as there:
        assert _LIBC.setns(there.fileno(), _NEW_NETWORK) == 0
    assert _LIBC.unshare(_NEW_MOUNTS | _NEW_NAME) == 0
    assert _LIBC.mount(b"none", b"/", None, _PRIVATE, None) == 0
    assert _LIBC.mount(os.fsencode(folder / name), b"/etc/hosts", None, _BIND, None) == 0
    socket.sethostname(name)
    assert socket.gethostbyname(name) == "127.0.1.1"
    os.environ.update(MASTER_ADDR=NAMES[0], LOCAL_RANK=str(int(os.environ["RANK"]) % 2))


def trains(folder: Path, out: Path) -> None:
    distributed.prepare_import("cpu")

    def work() -> None:
        be_on_host(folder)
        train(LAYOUT, out, steps=3)
        listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
        told = [os.environ[name] for name in network.VARIABLES]
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps([told, sorted(set(listening))]))

    launch(work, 4, "cpu")


def trains_here(out: Path) -> None:
    distributed.prepare_import("cpu")
    launch(lambda: train(LAYOUT, out, steps=3), 4, "cpu")


def trains_on(folder: Path, out: Path) -> None:
    """Until the cable is cut."""
    distributed.prepare_import("cpu")

    def work() -> None:
        be_on_host(folder)
        rank = int(os.environ["RANK"])
        watchdog = Watchdog(heartbeat.start(out / "heartbeats", rank), out, 4, limit=5.0)
        watchdog.start()
        train(LAYOUT, out, steps=100_000)

    launch(work, 4, "cpu")


_STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """Also of a test that fails; ranks end with their launcher."""
    yield
    while _STARTED:
        _STARTED.pop().kill()


def started(function: str, *folders: Path) -> subprocess.Popen:
    """In a process of its own: process groups of tests before would crash forked ones."""
    script = (
        f"import pathlib, test_two_hosts as here; here.{function}(*map(pathlib.Path, {[str(f) for f in folders]!r}))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TWO_HOSTS": json.dumps(NAMES)}
    command = [sys.executable, "-c", script, *map(str, folders)]
    _STARTED.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    return _STARTED[-1]


def test_two_hosts_train_as_one_does(hosts, tmp_path):
    """Without GLOO_SOCKET_IFNAME, by the cable between them."""
    import torch

    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    two, one = started("trains", hosts, tmp_path / "two"), started("trains_here", tmp_path / "one")
    for process in (two, one):
        told = process.communicate(timeout=200)[1]
        assert process.returncode == 0, told
    for rank in range(4):
        interface = f"cable-{'ab'[rank // 2]}"
        chosen, listening = json.loads((tmp_path / "two" / f"{rank}.json").read_text())
        assert chosen == [interface, f"={interface}"]
        assert set(listening) <= {f"10.77.0.{rank // 2 + 1}", *(["::", "0.0.0.0"] if rank == 0 else [])}
        got, expected = (torch.load(tmp_path / name / f"{rank}.pt", weights_only=False) for name in ("two", "one"))
        assert got["losses"] == expected["losses"]
        assert got["norms"] == expected["norms"]


def test_a_cut_cable_is_named(hosts, tmp_path):
    process = started("trains_on", hosts, tmp_path)
    deadline = time.monotonic() + 120
    while True:
        beats = [heartbeat.read(tmp_path / "heartbeats" / str(rank)) for rank in range(4)]
        if all(beat is not None and beat.marks > 100 for beat in beats):
            break
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ip("-n", NAMES[1], "link", "set", "cable-b", "down")
    cut = time.monotonic()
    told = process.communicate(timeout=60)[1]
    assert time.monotonic() - cut < 16
    assert process.returncode == HUNG, told
    assert "no progress for 5 s: rank " in told
    assert sorted(file.name for file in (tmp_path / "hangs").glob("*.txt")) == [f"{rank}.txt" for rank in range(4)]


def test_the_way_to_rank_0(monkeypatch):
    """What the shell says stays; one machine needs no line in the log."""
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    assert network.choose("") is None
    assert os.environ == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": network._interface("127.0.0.1")}
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(network, "_leads_from", lambda target: "192.0.2.7")
    assert "no interface of this machine leads to rank 0 at 192.0.2.1" in network.choose("192.0.2.1")
    assert os.environ == {}
    assert network.reached("127.0.1.1", 1, 0.0) == ""
    assert network.reached("::1", 1, 0.0) == ""
    with pytest.raises(OSError, match="not known"):
        network.reached("no-such-host.invalid", 1, 0.0)


def test_a_name_that_nobody_knows(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such.invalid", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(rendezvous.Absent, match=r"MASTER_ADDR: no-such\.invalid cannot be reached from here"):
        rendezvous.meet(rendezvous.Presence(1), 0.0, 1)
