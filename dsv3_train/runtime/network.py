"""Which network interface gloo and NCCL talk over: by themselves they take the one of the host's own name, which on
Debian's /etc/hosts is loopback (127.0.1.1), and then publish that to other machines.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time

import psutil

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def reached(address: str, port: int, seconds: float) -> str:
    """The IP address that `address` stands for here and can be routed to; empty if that is this machine's loopback.

    Args:
        seconds: for the name to become known, as a new machine's does.

    Raises:
        OSError: the name is not known here, or nothing leads there.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            for family, kind, _, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM):
                with socket.socket(family, kind) as probe:
                    probe.connect(where)  # sends nothing
                found = str(where[0]).split("%")[0]
                return "" if ipaddress.ip_address(found).is_loopback else found
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def choose(rank_0: str) -> str | None:
    """Let gloo and NCCL use the interface that leads to rank 0's machine, where the shell names none.

    Args:
        rank_0: its address as another machine reaches it; empty: all ranks are on this one, and loopback is used.

    Returns:
        a line for the log; None: there is nothing to say.
    """
    open_names = [name for name in VARIABLES if not os.environ.get(name)]
    if not open_names:
        return None
    name = _interface(_leads_from(rank_0 or "127.0.0.1"))
    if name is None:
        return f"no interface of this machine leads to rank 0 at {rank_0}: gloo and NCCL choose; set {VARIABLES[0]}"
    for variable in open_names:
        os.environ[variable] = f"={name}" if variable.startswith("NCCL") else name  # `=`: eth1 is not eth10
    return f"{' and '.join(open_names)}: {name}, which leads to rank 0 at {rank_0}" if rank_0 else None


def _leads_from(target: str) -> str:
    """This machine's address on the way to another one; empty without a way."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(where)
                return str(probe.getsockname()[0])
    return ""


def _interface(own: str) -> str | None:
    """The interface that has an address of this machine."""
    for name, addresses in psutil.net_if_addrs().items():
        if own and own in [address.address.split("%")[0] for address in addresses]:
            return name
    return None
