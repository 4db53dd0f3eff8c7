"""Telling a report: one JSON object, or tables and the names of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def tell(figures: dict[str, Any], show: Callable[..., None], written: list[Path], as_json: bool) -> None:
    """Print figures through `show(figures, console)`, and what was written; with `as_json` the figures alone."""
    if as_json:
        from dsv3_train.profiling.report import as_json as to_json

        print(to_json(figures))
        return
    from rich.console import Console

    show(figures, Console())
    for path in written:
        print(f"wrote {path}")
