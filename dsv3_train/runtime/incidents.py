"""What went wrong in a run, one JSON object per line of RUN_DIR/incidents.jsonl, over all its restarts."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from dsv3_train import regular
from dsv3_train.errors import UserError
from dsv3_train.lines import newest_first


def record(run_dir: Path, kind: str, **facts: Any) -> None:
    """Append an incident. Several processes may do so at once; a disk that is full does not make things worse."""
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, **facts}) + "\n"
    try:
        with regular.appended(run_dir / "incidents.jsonl") as file:
            file.write(line.encode())
    except (OSError, UserError):
        pass  # told on the console as well


def read(run_dir: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The last incidents, or all, oldest first; without lines that are none (the disk was full in mid line)."""
    path = run_dir / "incidents.jsonl"
    if not path.is_file():
        return []
    told = (line for _, line in newest_first(path) if line is not None and _is_whole(line))
    return list(itertools.islice(told, last))[::-1]


def _is_whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(name), str) for name in ("time", "kind", "text"))
