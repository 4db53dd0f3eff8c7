"""Loss spikes: a loss far above those before it, by the median and its median distance, which a spike cannot move."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_LEAST = 8
"""Losses that are needed before anything is a spike."""
_FLOOR = 1e-3
"""Smallest standard deviation (nats): a flat curve must not turn noise into spikes."""


class Spikes:
    """The last losses of a run."""

    def __init__(self, threshold: float | None, window: int, losses: list[float] | None = None) -> None:
        """`losses`: what a checkpoint kept."""
        self.threshold = threshold
        self.losses: deque[float] = deque(losses or [], maxlen=window)

    def score(self, loss: float) -> float:
        """Robust z-score of a loss (nats) against those before it; 0 while there are too few."""
        if len(self.losses) < _LEAST:
            return 0.0
        middle = median(self.losses)
        spread = 1.4826 * median(abs(value - middle) for value in self.losses)
        return (loss - middle) / max(spread, _FLOOR)

    def add(self, loss: float) -> bool:
        """Take a step's loss; true: it is a spike, and not taken. One that is no number never is."""
        if not math.isfinite(loss):
            return False
        if self.threshold is not None and self.score(loss) > self.threshold:
            return True
        self.take(loss)
        return False

    def take(self, loss: float) -> None:
        """Measure later losses against this one too, also if it is a spike: one that is trained on all the same.

        A rise that lasts is thus the usual loss after half a window.
        """
        self.losses.append(loss)
