"""A second analysis of a trace, which shares only the table of names with the first: what tools/fuzz_traces.py holds
`dsv3 profile analyze` to."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from decimal import Decimal, DecimalException
from typing import Any

from dsv3_train.profiling.classes import Table

LOCAL = ("Memcpy DtoD (Device -> Device)", "CopyDeviceToDevice", "MemcpyD2D")
"""Names of copies within a device that some tools give the category kernel."""


def oracle(raw: bytes, rules: Table) -> list[tuple[int, int, int]] | None:
    """(compute, communication, exposed) of every GPU of a trace, by another reader and a sweep; None: no JSON."""
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig", "replace")
        content = json.loads(text, parse_float=Decimal, strict=False)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error):
        return None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        return None
    gpus: dict[Any, dict[Any, list[tuple[int, int, bool]]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        cat, args = event.get("cat"), event.get("args")
        which = {"kernel": "kernel", "gpu_memcpy": "memcpy", "memcpy": "memcpy", "gpu_memset": "memset"}.get(
            str(cat).lower().split(",")[0].strip()
        )
        if event.get("ph") != "X" or which is None or not isinstance(cat, str):
            continue
        start, took = _ns(event.get("ts")), _ns(event.get("dur"))
        if start is None or took is None or not 0 <= took <= 1 << 50:
            continue
        args = args if isinstance(args, dict) else {}
        stream, pid, context = (
            value if isinstance(value, (str, int)) else None
            for value in (args.get("stream", event.get("tid")), event.get("pid"), args.get("context"))
        )
        name = event.get("name", "")
        name = str(name) if isinstance(name, (str, int)) else ""
        if which == "kernel" and name in LOCAL:
            which = "memcpy"
        is_comm = rules.classify(which, name)[1] == "communication"
        device = args.get("device", event.get("pid"))
        try:
            device = Decimal(device)
        except (TypeError, ValueError, DecimalException):
            device = device if isinstance(device, str) else None
        gpus[pid, device][context, stream].append((start, start + took, is_comm))
    return [_swept(streams) for streams in gpus.values()]


def _ns(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, str, Decimal)):
        return None
    try:
        number = Decimal(value) * 1000
        if not number.is_finite() or abs(number) >= 1 << 63:
            return None
        found = int(number.to_integral_value())
    except (DecimalException, ValueError, OverflowError):
        return None
    return found if -(1 << 50) < found < 1000 << 52 else None


def _swept(streams: dict[Any, list[tuple[int, int, bool]]]) -> tuple[int, int, int]:
    """Event by event over all moments at which a kernel begins or ends."""
    changes: list[tuple[int, int, int]] = []
    for kernels in streams.values():
        kernels.sort()
        for index, (start, end, is_comm) in enumerate(kernels):
            if index + 1 < len(kernels):
                end = min(end, kernels[index + 1][0])
            changes += [(start, is_comm, 1), (end, is_comm, -1)]
    changes.sort()
    running, totals, before = [0, 0], [0, 0, 0], 0
    for moment, is_comm, change in changes:
        if running[0]:
            totals[0] += moment - before
        if running[1]:
            totals[1] += moment - before
            totals[2] += 0 if running[0] else moment - before
        running[is_comm] += change
        before = moment
    return totals[0], totals[1], totals[2]
