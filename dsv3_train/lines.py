"""Lines of JSON from a file's end: of a long run's metrics, hundreds of megabytes, the last ones are wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_train.errors import UserError

_BLOCK = 1 << 20
_LONGEST = 64 << 20


def newest_first(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Each line's first byte, and the object in it, last line first; None for a line that was cut short.

    Raises:
        OSError: the file cannot be read.
        UserError: a line is longer than any that a run writes.
    """
    with path.open("rb") as file:
        end, rest = file.seek(0, 2), b""  # `rest`: the beginning of a line whose end is in the block after it
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start) + rest
            if len(block) > _LONGEST:
                raise UserError(
                    f"{path}: a line of more than {_LONGEST >> 20} MiB, which no run has written; remove it"
                )
            first = 0 if start == 0 else block.find(b"\n") + 1 or len(block)
            rest, at = block[:first], start + len(block)
            for line in reversed(block[first:].splitlines(keepends=True)):
                at -= len(line)
                yield at, _object(line)
            end = start


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text, of its last 64 MiB at most."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _LONGEST))
        return file.read(_LONGEST).decode(errors="replace").splitlines()[-lines:]


def step_of(line: dict[str, Any] | None) -> int | None:
    """The step that a line is of; None where it has none."""
    step = line.get("step") if line else None
    return step if type(step) is int and 0 <= step < 1 << 63 else None


def newest_step(path: Path) -> int:
    """The step of the last line that is whole; 0 without one."""
    if not path.is_file():
        return 0
    return next((step for _, line in newest_first(path) if (step := step_of(line)) is not None), 0)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # cut short, or brackets without end
        return None
    return found if isinstance(found, dict) else None
