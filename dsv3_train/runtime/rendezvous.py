"""Where the ranks of a run meet: in limited time, with the same versions, and those that stay away named."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from dsv3_train.errors import UserError


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

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def meet(me: Presence, seconds: float, per_node: int) -> tuple[dist.Store, list[Presence]]:
    """Wait until every rank has come, and compare what they say.

    Rank, world and address are those of the environment (torchrun's, or runtime/launch.py's). Rank 0 keeps the store,
    unless torchrun's agent does.

    Returns:
        the store, for `init_process_group`, and everyone on rank 0 (nobody elsewhere).

    Raises:
        Absent: on every rank that came, with the same text: who is missing, which node is at fault, who has another
            version or recipe; or, on this one, that the meeting place does not answer.
    """
    world = int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = datetime.timedelta(seconds=seconds)
    _allow_files(world)
    try:
        server: dist.Store = dist.TCPStore(
            address, port, None, me.rank == 0 and not theirs, timeout, wait_for_workers=False, multi_tenant=True
        )
        # torchrun keeps its store over restarts.
        store = dist.PrefixStore(f"dsv3/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        store.set(f"here/{me.rank}", json.dumps(asdict(me)))
        everyone: list[Presence] = []
        if me.rank == 0:
            everyone, verdict = _receive(store, world, seconds, per_node)
            store.set("verdict", verdict)
        else:
            # Rank 0 waits for the last to come, and may itself have come late.
            store.wait(["verdict"], 2 * timeout)
            verdict = store.get("verdict").decode()
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if me.rank == 0:
            raise Absent(f"{me}: cannot keep the meeting place at port {port}: {str(error).splitlines()[0]}") from None
        reasons = "".join(f"; {fault}" for fault in me.faults)
        raise Absent(
            f"{me}: no word from rank 0 at {address}:{port} within {seconds:g} s (faults.join_seconds): its process or "
            f"node is missing, or a firewall is between ({type(error).__name__}){reasons}"
        ) from None
    if verdict:
        if me.rank == 0:
            time.sleep(1)  # the store ends with this process: let the others read why
        raise Absent(verdict)
    return store, everyone


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
            came.append(Presence(**json.loads(store.get(f"here/{rank}"))))
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
