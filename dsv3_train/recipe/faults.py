"""What is wrong with a recipe, and where: one line per fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from dsv3_train.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a setting was written: a file's line, or an override of the command line."""

    source: str
    line: int | None = None
    """Counted from 1; None: the source as a whole."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """`place: key: message`; the message says what is wrong and what would be right."""

    place: Place
    key: str
    """Dotted path of the setting; empty for the source as a whole."""
    message: str

    def __str__(self) -> str:
        told = ": ".join(str(part) for part in (self.place, self.key, self.message) if str(part))
        return told.replace("\n", "\\n")  # of what it quotes


def dotted(path: Iterable[str | int]) -> str:
    """`("data", "train", 0)` -> `data.train.0`."""
    return ".".join(map(str, path))


def refuse(faults: Iterable[Fault]) -> NoReturn:
    """Raise all faults together: by source and line, one message per setting.

    Raises:
        UserError: always.
    """
    first: dict[tuple[Place, str], Fault] = {}
    for fault in faults:
        # A setting that cannot even be read is wrong in other ways too; the first is the cause.
        first.setdefault((fault.place, fault.key), fault)
    sources = list(dict.fromkeys(fault.place.source for fault in first.values()))
    ordered = sorted(first.values(), key=lambda fault: (sources.index(fault.place.source), fault.place.line or 0))
    raise UserError("\n".join(map(str, ordered)))
