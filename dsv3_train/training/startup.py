"""Where the time from the command to the first step goes."""

from __future__ import annotations

import time

import psutil


class Startup:
    """Marks the end of each phase, from the start of this process (or of the one that forked it)."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.phases: dict[str, float] = {}

    def again(self) -> None:
        """This process was forked for a restart: what came before does not count."""
        self._last = psutil.Process().create_time()
        self.phases = {}

    def mark(self, phase: str) -> None:
        """What went by since the last mark was `phase`."""
        now = time.time()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return f"first step done {sum(self.phases.values()):.1f} s after the start: {parts}"
