"""Samples that a run passes over: told by the recipe, or found to be bad on the way, and then kept for good.

A global batch that holds one of them counts as consumed, but nothing is computed: schedules, data order and number of
steps stay as they are, in any layout. What a run finds is a line of RUN_DIR/skips.jsonl, which every later start of
the run follows.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dsv3_train import regular
from dsv3_train.errors import UserError, on_one_line
from dsv3_train.recipe.ranges import LARGEST_EXTENT

NAME = "skips.jsonl"
Reason = Literal["recipe", "not finite", "spike", "token"]


@dataclass(frozen=True)
class Skip:
    """Samples `first` to `last`, of which no global batch is trained on."""

    first: int
    last: int
    reason: Reason
    step: int = 0
    """At which it was found, from 1."""
    loss: float | None = None
    """Of that step; None where it was no number."""

    def holds_any(self, first_sample: int, batch_size: int) -> bool:
        """Whether a global batch has a sample of it."""
        return self.first < first_sample + batch_size and first_sample <= self.last


class Skips:
    """Everything that a run passes over."""

    def __init__(self, run_dir: Path, from_recipe: list[str]) -> None:
        """Read what the run found before.

        Raises:
            UserError: its file holds something else.
        """
        self.path = run_dir / NAME
        told = [text.split("-") for text in from_recipe]
        self.all = [Skip(int(first), int(last), "recipe") for first, last in told]
        self.all += read(run_dir)

    def covers(self, first_sample: int, batch_size: int) -> bool:
        """Whether a global batch is to be passed over."""
        return any(skip.holds_any(first_sample, batch_size) for skip in self.all)

    def add(self, skip: Skip, *, write: bool) -> None:
        """Pass over more from now on. `write`: on rank 0, before anything else follows from it.

        Raises:
            UserError: it cannot be written, so that a restart would not know of it.
        """
        self.all.append(skip)
        if not write:
            return
        try:
            with regular.appended(self.path) as file:
                file.write((json.dumps(asdict(skip), allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space") from None

    def rollbacks(self) -> int:
        """Spikes that the run rolled back from."""
        return sum(skip.reason == "spike" for skip in self.all)

    def before(self, consumed_samples: int) -> list[list[int]]:
        """(first, last) of what lies before a position: what a checkpoint there has passed over."""
        return [[skip.first, skip.last] for skip in self.all if skip.first < consumed_samples]

    def against(self, common: dict[str, Any], another: Skip | None = None) -> str | None:
        """Why not to go on from a checkpoint (its small state): it was trained on samples to pass over. Else None.

        `another` counts as if it were added. What the recipe says counts from here on: it may be news to an old run.
        """
        position, known = common["position"], common.get("guarded", {}).get("skipped", [])
        for skip in [*self.all, *([another] if another else [])]:
            late = skip.first < position["consumed_samples"] and [skip.first, skip.last] not in known
            if skip.reason != "recipe" and late:
                return f"it was trained on samples {skip.first}-{skip.last} ({skip.reason})"
        return None


def read(run_dir: Path) -> list[Skip]:
    """What a run found to be bad, oldest first.

    Raises:
        UserError: the file holds something else.
    """
    path = run_dir / NAME
    if not os.path.lexists(path):
        return []
    found = []
    for number, line in enumerate(regular.text(path, regular.LARGEST, "a JSON object per line").splitlines(), 1):
        try:
            found.append(_checked(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: not a skip ({on_one_line(str(error))[:200]}); correct or remove the line"
            ) from None
    return found


def _checked(line: Any) -> Skip:
    """ValueError or TypeError where it is not what a run writes."""
    skip = Skip(**line)
    for name in ("first", "last", "step"):
        value = getattr(skip, name)
        if type(value) is not int or not 0 <= value <= LARGEST_EXTENT:
            raise ValueError(f"{name} is {value!r:.50}, and has to be a whole number")
    if skip.last < skip.first:
        raise ValueError(f"last {skip.last} is before first {skip.first}")
    if skip.reason not in get_args(Reason):
        raise ValueError(f"reason is {skip.reason!r:.50}, and has to be one of {', '.join(get_args(Reason))}")
    if skip.loss is not None and (type(skip.loss) not in (int, float) or not abs(skip.loss) < float("inf")):
        raise ValueError(f"loss is {skip.loss!r:.50}, and has to be a finite number or null")
    return skip
