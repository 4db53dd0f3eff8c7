"""Traces and reports, changed at random, through `dsv3 profile`'s reader, analysis and pages, in this process.

    python tools/fuzz_traces.py --inputs 2000 --seed 1

A fifth are harmless changes (order of keys and events, white space, gzip, a bare array, times as text or as `B` and
`E`): all have to be accepted with the figures that the trace was made with. Of the others, each is refused in one line
or accepted with the figures of a second analysis (`oracle`), which shares only the table of names with the first;
what is no JSON by Python's own reader is refused. Nothing raises anything else, prints control characters, takes more
than 60 s, or leaves the process with more than 2 GiB.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from trace_oracle import LOCAL, oracle

from dsv3_train.errors import UserError
from dsv3_train.profiling.classes import Table, table
from dsv3_train.profiling.compare import compare, load
from dsv3_train.profiling.page import page
from dsv3_train.profiling.report import as_json, report
from dsv3_train.profiling.table import show
from dsv3_train.profiling.trace import read
from dsv3_train.profiling.work import works

SECONDS, MEMORY = 60, 2 << 30
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
COMPUTE = ("sm90_xmma_gemm_bf16bf16_bf16f32", "Cijk_Ailk_Bljk_BBS_BH_MT256x256x64", "void flash_fwd_kernel<128>")
COMM = ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)")
NASTY: tuple[Any, ...] = (
    None, True, "", "\x1b[2J\x07", "\ud800\u202e", "[/] $\\frac{", "<script>", 0, -1, 1 << 70, -(1 << 62), 10**30,
    1e308, float("nan"), float("inf"), "1e999999999", "NaN", "sNaN", "0x10", "9" * 400, [], {},
    [[[[]]]], {"a": {"b": []}},
    json.loads("[" * 200 + "]" * 200), "kernel", "gpu_memcpy", "ProfilerStep#3", "ProfilerStep#" + "9" * 30,
    "x" * 5000,
)  # fmt: skip


class Wrong(Exception):
    """What may not happen."""


def made(draw: random.Random) -> tuple[list[dict], list[tuple[int, int, int]]]:
    """Events of one or several GPUs, and (compute, communication, exposed) of each in nanoseconds, as placed."""
    events: list[dict] = []
    known = []
    for gpu in range(draw.choice([1, 1, 1, 2, 3])):
        pid: Any = gpu if draw.random() < 0.5 else f"host{gpu}:{4000 + gpu}"
        device = gpu if pid == gpu else 0
        at, figures = draw.randrange(10**6) * 1000, [0, 0, 0]
        number = 1
        for step in range(draw.randrange(1, 8)):
            compute, comm = draw.randrange(2, 400) * 1000, draw.randrange(1, 400) * 1000
            hidden = draw.randrange(0, min(compute, comm) // 1000 + 1) * 1000
            parts = sorted({0, *(draw.randrange(compute) for _ in range(draw.randrange(4))), compute})
            placed = [(draw.choice(COMPUTE), at + a, b - a, 7) for a, b in itertools.pairwise(parts)]
            placed += [(draw.choice(COMM), at + compute - hidden, comm, 20)]
            end = at + max(compute, compute - hidden + comm)
            if draw.random() < 0.3:
                placed.append((draw.choice(LOCAL), end + 2000, 3000, 7))
                figures[0] += 3000
                end += 5000
            late = draw.randrange(len(parts) - 1) if len(parts) > 2 and draw.random() < 0.3 else None
            for index, (name, start, took, stream) in enumerate(placed):
                if index == late and index + 2 < len(parts):  # it runs on, into the next one of its stream
                    took += draw.randrange(1, 10**6) + placed[index + 1][1] - start - took
                args = {"device": device, "stream": stream, "correlation": number}
                cat = "gpu_memcpy" if name in LOCAL else "kernel"
                events.append(_event(cat, name, pid, stream, start, took, args))
                number += 1
            events.append(_event("user_annotation", f"ProfilerStep#{step}", 9000, 1, at, end - at, {}))
            figures[0] += compute
            figures[1] += comm
            figures[2] += comm - hidden
            at = end + draw.randrange(0, 100) * 1000
        known.append((figures[0], figures[1], figures[2]))
    return events, known


def _event(cat: str, name: str, pid: Any, tid: Any, start: int, took: int, args: dict) -> dict:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": start / 1e3,
        "dur": took / 1e3,
        "args": args,
    }


def harmless(draw: random.Random, events: list[dict]) -> bytes:
    """The same trace, written otherwise."""
    events = [dict(event) for event in events]
    if draw.random() < 0.5:
        draw.shuffle(events)
    if draw.random() < 0.3:  # times as text, and events as their two halves
        events = [{**event, "ts": str(event["ts"]), "dur": repr(event["dur"])} for event in events]
    elif draw.random() < 0.3 and not any(map(_overruns, [events])):
        halves = []
        for event in sorted(events, key=lambda one: one["ts"]):
            begin = {key: value for key, value in event.items() if key != "dur"} | {"ph": "B"}
            halves += [begin, {**begin, "ph": "E", "ts": event["ts"] + event["dur"]}]
        events = halves
    if draw.random() < 0.5:
        events = [dict(draw.sample(list(event.items()), len(event))) for event in events]
    more = [{"ph": "M", "name": "process_sort_index", "pid": 0, "args": {}}, {"ph": "C", "name": "x", "ts": 1}, {}]
    for _ in range(draw.randrange(4)):
        events.insert(draw.randrange(len(events) + 1), draw.choice(more))
    content: Any = events
    if draw.random() < 0.7:
        keys = [("schemaVersion", 1), ("deviceProperties", [{"id": 0}]), ("traceEvents", events), ("a", {"b": [1.5]})]
        content = dict(draw.sample(keys, len(keys)))
    text = json.dumps(content, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
    raw = draw.choice(["", "\ufeff", " \n\t"]).encode() + text.encode() + draw.choice([b"", b"\n"])
    return gzip.compress(raw, 1) if draw.random() < 0.3 else raw


def _overruns(events: list[dict]) -> bool:
    """Whether a stream has a kernel within another, which halves would nest."""
    of: dict[Any, list[dict]] = defaultdict(list)
    for event in sorted(events, key=lambda one: one["ts"]):
        of[str(event["pid"]), event["tid"]].append(event)
    return any(a["ts"] + a["dur"] > b["ts"] for mine in of.values() for a, b in itertools.pairwise(mine))


def damaged(draw: random.Random, events: list[dict]) -> bytes:
    """Bytes changed, cut, doubled; or values of the JSON replaced by nasty ones, keys left out, events doubled."""
    if draw.random() < 0.6:
        content: Any = {
            "distributedInfo": {"rank": 0},
            "traceEvents": [json.loads(json.dumps(event)) for event in events],
        }
        for _ in range(draw.choice([1, 1, 2, 5, 20])):
            _spoil(draw, content)
        return json.dumps(content).encode("utf-8", "surrogatepass")
    raw = bytearray(json.dumps({"traceEvents": events} if draw.random() < 0.7 else events).encode())
    zipped = draw.random() < 0.25
    if zipped and draw.random() < 0.5:
        raw, zipped = bytearray(gzip.compress(bytes(raw), 1)), False
    for _ in range(draw.choice([1, 1, 1, 3])):
        where = draw.randrange(len(raw)) if raw else 0
        kind = draw.randrange(6)
        if kind == 0:
            del raw[where:]
        elif kind == 1 and raw:
            raw[where] ^= 1 << draw.randrange(8)
        elif kind == 2:
            raw[where:where] = draw.choice(
                [b"{", b"}", b"[", b"]", b",", b'"', b"\x00", b"\xff\xfe", b"1" * 5000, b"[" * 5000]
            )
        elif kind == 3:
            del raw[where : where + draw.randrange(1, 50)]
        elif kind == 4:
            raw += raw[where:]
        else:
            raw[where:where] = raw[where : where + draw.randrange(1, 300)]
    return gzip.compress(bytes(raw), 1) if zipped else bytes(raw)


def _spoil(draw: random.Random, content: Any) -> None:
    """One value somewhere within."""
    here, key = content, "traceEvents"
    while isinstance(here[key], (dict, list)) and here[key] and (here is content or draw.random() < 0.8):
        here = here[key]
        key = draw.choice(list(here)) if isinstance(here, dict) else draw.randrange(len(here))
    kind = draw.randrange(4)
    if kind == 0 and isinstance(here, dict):
        del here[key]
    elif kind == 1 and isinstance(here, list):
        here.insert(key, here[key])
    elif isinstance(here[key], (int, float)) and draw.random() < 0.4:
        here[key] = draw.choice([-here[key], here[key] * 1000, here[key] + 0.5, str(here[key]), here[key] / 3])
    else:
        here[key] = draw.choice(NASTY)


def analysed(path: Path, rules: Table) -> list[tuple[int, int, int]]:
    """As `dsv3 profile analyze` does it; (compute, communication, exposed) of every GPU."""
    found = works([read(path)], rules)
    figures = report(found)
    console = Console(file=io.StringIO(), width=120)
    show(figures, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    text, drawn = as_json(figures), page(found, figures)
    drawn.encode()
    for what, written in (("terminal", printed), ("page", drawn), ("report", text)):
        if bad := OBEYED.search(written):
            raise Wrong(f"the {what} shows {bad[0]!r}")
    keys = ("compute_ms", "comm_ms", "exposed_comm_ms")
    on_gpu = [rank for rank in figures.get("ranks", [figures]) if rank["device"] != "cpu"]
    for rank in on_gpu:
        parts = rank["compute_ms"] + rank["exposed_comm_ms"] + rank["idle_ms"]
        if not math.isclose(parts, rank["span_ms"], rel_tol=1e-9, abs_tol=1e-6):
            raise Wrong("compute, exposed communication and idle do not add up to the span")
    return [tuple(round(rank[key] * 1e6) for key in keys) for rank in on_gpu]  # type: ignore[misc]


def one_trace(draw: random.Random, path: Path, rules: Table) -> str:
    """Try one; what came of it."""
    events, known = made(draw)
    well = draw.random() < 0.2
    raw = harmless(draw, events) if well else damaged(draw, events)
    path.write_bytes(raw)
    try:
        figures = analysed(path, rules)
    except UserError as error:
        _one_line(error)
        if well:
            raise Wrong(f"a harmless change is refused: {error}") from None
        return "refused"
    expected = known if well else oracle(raw, rules)
    if expected is None:
        if not _may_be_open(raw):
            raise Wrong("what is no JSON was accepted")
        return "accepted, not closed"
    if figures and sorted(figures) != sorted(expected) and not _far(figures):
        raise Wrong(f"figures {sorted(figures)}, expected {sorted(expected)}")
    return "harmless" if well else "accepted"


def _may_be_open(raw: bytes) -> bool:
    """Whether it is a bare array that lacks nothing but its end, which the format allows; or a comma before one."""
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig", "replace").rstrip()
    closed = re.sub(r",\s*([]}])", r"\1", text.removesuffix(",") + ("" if text.endswith(("]", "}]")) else "]"))
    for attempt in (closed, closed + "]", re.sub(r",\s*([]}])", r"\1", text)):
        try:
            json.loads(attempt, strict=False)
            return True
        except (ValueError, RecursionError):
            continue
    return False


def _far(figures: list[tuple[int, int, int]]) -> bool:
    """Whether milliseconds as floats no longer hold nanoseconds."""
    return max(map(max, figures)) > 1 << 50


def one_report(draw: random.Random, folder: Path, rules: Table) -> str:
    """A report, spoilt or written otherwise, beside itself."""
    events, _ = made(draw)
    path = folder / "t.json"
    path.write_text(json.dumps(events))
    whole = json.loads(as_json(report(works([read(path)], rules))))
    (folder / "whole.json").write_text(json.dumps(whole))
    well = draw.random() < 0.2
    spoilt = json.loads(json.dumps(whole))
    if well:
        raw = json.dumps(dict(draw.sample(list(spoilt.items()), len(spoilt))), indent=draw.choice([None, 2])).encode()
    elif draw.random() < 0.5:
        content = {"traceEvents": spoilt}
        for _ in range(draw.choice([1, 3, 10])):
            _spoil(draw, content)
        raw = json.dumps(content.get("traceEvents")).encode("utf-8", "surrogatepass")
    else:
        raw = json.dumps(spoilt).encode()
        where = draw.randrange(len(raw))
        raw = draw.choice(
            [raw[:where], raw[:where] + b"\xff" + raw[where:], raw + raw, raw[: where // 2] + raw[where:]]
        )
    (folder / "report.json").write_bytes(raw)
    try:
        compared = compare(load(folder / "report.json"), load(folder / "whole.json"))
    except UserError as error:
        _one_line(error)
        if well:
            raise Wrong(f"a harmless change is refused: {error}") from None
        return "report refused"
    json.dumps(compared, allow_nan=False)
    if well and any(compared[key]["difference"] for key in ("span_ms", "compute_ms", "exposed_comm_ms")):
        raise Wrong("a report differs from itself")
    return "report harmless" if well else "report accepted"


def one_odd_file(draw: random.Random, folder: Path, rules: Table) -> str:
    """What is no regular file, by any name."""
    path = folder / draw.choice(["a.json", "a\x1b[2J.json.gz", "$(id).json", "a\nb.json"])
    kind = draw.choice(["fifo", "folder", "zero", "nothing", "link"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("zero", "link"):
        path.symlink_to("/dev/zero" if kind == "zero" else path)
    try:
        for function in (lambda: analysed(path, rules), lambda: load(path), lambda: table(path)):
            try:
                function()
            except UserError as error:
                _one_line(error)
            else:
                raise Wrong(f"a {kind} was accepted")
    finally:
        if kind == "folder":
            path.rmdir()
        elif kind != "nothing":
            path.unlink()
    return "no file"


def _one_line(error: UserError) -> None:
    if OBEYED.search(str(error)) or "\n" in str(error):
        raise Wrong(f"a refusal that is not one line of plain text: {str(error)!r}")


def _memory(what: str) -> int:
    """Bytes of this process: resident now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what))


def run(inputs: int, seed: int, folder: Path, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Try so many; what came of them, and what went wrong."""
    rules, came, wrong = table(), Counter[str](), []

    def too_long(*_: Any) -> None:
        raise Wrong(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: other tests' is not ours
    held = _memory("VmRSS")
    try:
        for number in range(inputs):
            draw = random.Random(f"{seed} {number}")
            kind = draw.random()
            signal.alarm(SECONDS)
            try:
                if kind < 0.8:
                    came[one_trace(draw, folder / "trace.json", rules)] += 1
                elif kind < 0.97:
                    came[one_report(draw, folder, rules)] += 1
                else:
                    came[one_odd_file(draw, folder, rules)] += 1
            except Exception as error:  # what is not expected is what is looked for
                came["wrong"] += 1
                wrong.append(f"seed {seed}, input {number}: {type(error).__name__}: {error}")
                if keep and (folder / "trace.json").exists():
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}.json").write_bytes((folder / "trace.json").read_bytes())
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    if _memory("VmHWM") - held > MEMORY:
        wrong.append(f"more than {MEMORY >> 30} GiB of memory")
    return came, wrong


def main() -> None:
    """Print what came of the inputs; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that went wrong")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        came, wrong = run(options.inputs, options.seed, Path(folder), options.keep)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    peak = _memory("VmHWM") / 2**30
    told = ", ".join(f"{count} {what}" for what, count in sorted(came.items()))
    print(f"{options.inputs} inputs, seed {options.seed}: {told}; {time.perf_counter() - start:.0f} s, {peak:.2f} GiB")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
