"""Where the ranks of a run meet: in limited time, with the same versions, and those that stay away named."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import resource
import socket
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from dsv3_train.errors import UserError
from dsv3_train.runtime import launcher, network


class Absent(UserError):
    """A rank or a node did not come, or cannot take part: with other nodes, or later, the same run may begin."""


@dataclass(frozen=True)
class Presence:
    """What a rank says of itself when it comes."""

    rank: int
    host: str = field(default_factory=platform.node)
    versions: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """Why its node cannot take part."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its recipe, by key; the first rank of a node tells them."""
    reaches: str = ""
    """Rank 0's address as this rank reaches it; empty: by loopback."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 tells all."""

    refused: str
    """Why the run cannot begin; empty: it can."""
    address: str
    """Of rank 0, as other machines reach it; empty: there are none."""


_kept: dict[int, dist.Store] = {}
"""By port: this process's own stores."""
_meetings = itertools.count()
_PRESENCE, _VERDICT = TypeAdapter(Presence), TypeAdapter(_Verdict)


def meet(me: Presence, seconds: float, per_node: int) -> tuple[dist.Store, list[Presence], list[str]]:
    """Wait until every rank has come, compare what they say, and choose the interface for gloo and NCCL.

    Rank, world and address are those of the environment (runtime/launcher.py). Rank 0 keeps the store, unless
    torchrun's agent does: on loopback alone where all ranks are on one machine.

    Returns:
        the store, for `init_process_group`; everyone on rank 0 (nobody elsewhere); lines for the log.

    Raises:
        Absent: on every rank that came, with the same text: who is missing, which node is at fault, who has another
            version or recipe; or, on this one, that the meeting place does not answer.
        UserError: the environment does not say where to meet.
    """
    place = launcher.read(os.environ)
    if place is None or place.port is None:
        raise UserError("MASTER_PORT: not set; start the ranks with dsv3 itself, torchrun, srun or mpirun")
    _allow_files(place.world_size)
    if not place.one_machine:
        try:
            me = replace(me, reaches=network.reached(place.address, place.port, seconds))
        except OSError as error:
            raise Absent(f"{me}: MASTER_ADDR: {place.address} cannot be reached from here ({error.strerror})") from None
    try:
        store = _store(place, datetime.timedelta(seconds=seconds))
        store.set(f"here/{me.rank}", _PRESENCE.dump_json(me).decode())
        everyone: list[Presence] = []
        if me.rank == 0:
            everyone, refused = _receive(store, place.world_size, seconds, per_node)
            verdict = _Verdict(refused, next((presence.reaches for presence in everyone if presence.reaches), ""))
            store.set("verdict", _VERDICT.dump_json(verdict).decode())
        else:
            # Rank 0 waits for the last to come, and may itself have come late.
            store.wait(["verdict"], datetime.timedelta(seconds=2 * seconds))
            verdict = _VERDICT.validate_json(store.get("verdict"))
    except (OSError, dist.DistNetworkError, dist.DistStoreError, ValidationError) as error:
        if me.rank == 0:
            raise Absent(
                f"{me}: cannot keep the meeting place at {place.address}:{place.port}: {str(error).splitlines()[0]}"
            ) from None
        reasons = "".join(f"; {fault}" for fault in me.faults)
        raise Absent(
            f"{me}: no word from rank 0 at {place.address}:{place.port} within {seconds:g} s (faults.join_seconds): "
            f"its process or node is missing, or a firewall is between ({type(error).__name__}){reasons}"
        ) from None
    if verdict.refused:
        if me.rank == 0:
            time.sleep(1)  # the store ends with this process: let the others read why
        raise Absent(verdict.refused)
    note = network.choose(verdict.address)
    return store, everyone, [note] if note else []


def _store(place: launcher.Joined, timeout: datetime.timedelta) -> dist.Store:
    """Rank 0's store; its keys stand under a word that the launcher drew, and are those of this start alone.

    PyTorch's store knows no passwords. A process that does not know the word cannot take a rank's place by accident;
    who can list its keys is kept out by the network alone (docs/launchers.md).
    """
    leads = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    assert place.port is not None
    listening = None
    if leads and place.one_machine and place.port not in _kept:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's own
        server.bind(("127.0.0.1", place.port))
        listening = server.detach()  # the store closes it
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True, "master_listen_fd": listening}
    store = _kept.get(place.port) or dist.TCPStore(place.address, place.port, None, leads, timeout, **options)
    if leads:
        _kept[place.port] = store
    # torchrun keeps its store over restarts, and we ours over the meetings of one process.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    words = ["dsv3", os.environ.get(launcher.MEETING, ""), restart, str(next(_meetings))]
    return dist.PrefixStore("/".join(words), store)


def _allow_files(world: int) -> None:
    """Let this process have open what it needs, one connection for each rank included, if its limits can be raised.

    Raises:
        Absent: they cannot.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world + 512
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Absent(
            f"on {platform.node()} a process may have {hard} files open (ulimit -Hn), and with {world} ranks one takes "
            f"up to {needed}; raise that limit (SLURM: LimitNOFILE of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _receive(store: dist.Store, world: int, seconds: float, per_node: int) -> tuple[list[Presence], str]:
    """Who came, and why the run cannot begin (empty: it can)."""
    deadline = time.monotonic() + seconds
    came, missing = [], []
    for rank in range(world):
        left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait([f"here/{rank}"], left)
            came.append(_PRESENCE.validate_json(store.get(f"here/{rank}")))
        except (dist.DistStoreError, dist.DistNetworkError):
            missing.append(rank)
    if missing:
        named = ", ".join(f"rank {rank} (number {rank % per_node} of node {rank // per_node})" for rank in missing[:16])
        named += f" and {len(missing) - 16} more" if missing[16:] else ""
        hosts = ", ".join(dict.fromkeys(presence.host for presence in came))
        return came, f"within {seconds:g} s (faults.join_seconds) {named} did not appear; here are {hosts}"
    broken = [f"{presence}: {fault}" for presence in came for fault in presence.faults]
    return came, "\n".join([*broken, *differences(came)])


def differences(everyone: list[Presence]) -> list[str]:
    """One line for each rank and package whose version is not the one of most ranks; and for settings of recipes."""
    versions = [(presence, presence.versions) for presence in everyone]
    settings = [(presence, presence.settings) for presence in everyone if presence.settings]
    same_recipe = "start all nodes with the same recipe and overrides"
    return _unlike(versions, "install the same") + _unlike(settings, same_recipe)


def _unlike(told: list[tuple[Presence, dict[str, Any]]], mend: str) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for _, values in told for name in values):
        of_each = [json.dumps(values[name]).strip('"') if name in values else "missing" for _, values in told]
        usual = Counter(of_each).most_common(1)[0][0]
        lines += [
            f"{presence}: {name} is {value}, and {usual} on the other ranks; {mend}"
            for (presence, _), value in zip(told, of_each, strict=True)
            if value != usual
        ]
    return lines
