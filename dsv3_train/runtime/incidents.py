"""What went wrong in a run, one JSON object per line of RUN_DIR/incidents.jsonl, over all its restarts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def record(run_dir: Path, kind: str, **facts: Any) -> None:
    """Append an incident. Several processes may do so at once; a disk that is full does not make things worse."""
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, **facts}) + "\n"
    try:
        handle = os.open(run_dir / "incidents.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError:
        pass  # told on the console as well


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All incidents so far, oldest first."""
    path = run_dir / "incidents.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the disk was full in mid line
            continue
    return found
