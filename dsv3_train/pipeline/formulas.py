"""Closed formulas of the schedules, and where they hold. `simulate` holds everywhere; tests compare the two."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_train.pipeline.durations import Durations
from dsv3_train.pipeline.operations import Schedule


@dataclass(frozen=True)
class Closed:
    """What formulas say of a schedule without p2p latency and with equal stages."""

    bubble: float
    """Idle time of the rank that idles most, in the unit of the durations."""
    busy: float
    """Computing time of that rank."""
    peak_in_flight: float
    """Forwards without their backward on the rank with most, in activations of 1/ranks of the model."""
    domain: str
    """Where both formulas are exact."""
    holds: bool
    """Whether this case lies within it."""

    @property
    def bubble_fraction(self) -> float:
        return self.bubble / (self.bubble + self.busy)


def parameter_copies(kind: str) -> int:
    """How often the model's parameters stand in a pipeline: dualpipe gives each stage to two ranks."""
    return 2 if kind == "dualpipe" else 1


def closed(schedule: Schedule, durations: Durations, pairs: bool = False) -> Closed:
    """Formulas of DualPipe's README (per device), of the zero-bubble paper (arXiv 2401.10241) and of Megatron's
    interleaving (arXiv 2104.04473), for the same number of ranks each.

    Args:
        pairs: the interleaved schedule was built with F&B pairs.
    """
    kind, ranks, count = schedule.kind, schedule.ranks, sum(schedule.micro_batches)
    forward, weights, pair = durations.F, durations.W, durations.pair
    inputs, whole = durations.I, durations.whole
    work = count * (forward + whole)
    if kind == "1f1b":
        return Closed((ranks - 1) * (forward + whole), work, min(ranks, count), "always", True)
    if kind == "interleaved":
        virtual = schedule.virtual
        bubble = (ranks - 1) * (forward + whole) / virtual
        ahead = 2 * (ranks - 1) + (virtual - 1) * ranks + 1 + pairs
        holds = count % ranks == 0 and not (pairs and durations.hidden)
        domain = "M a multiple of P" + ", FB = F+B" * pairs
        return Closed(bubble, work, min(ahead, count * virtual) / virtual, domain, holds)
    if kind == "zb1p":
        domain, holds = "M >= P, W <= I, B = I+W", count >= ranks and weights <= inputs and whole == inputs + weights
        return Closed((ranks - 1) * (forward + whole - 2 * weights), work, min(ranks, count), domain, holds)
    enough = count >= 2 * ranks
    if kind == "zbv":
        holds = enough and forward == inputs and inputs / 2 <= weights <= inputs
        work = count * (forward + inputs + weights)  # never a whole backward
        return Closed((ranks - 1) * forward / 2, work, ranks, "M >= 2P, F = I, I/2 <= W <= I", holds)
    # The dual schedules: what a rank idles least of is pairs, which overlap saves from.
    steady = forward == inputs and weights <= inputs and whole == inputs + weights and durations.hidden >= 0
    domain = "M >= 2P, F = I, W <= I, B = I+W, FB <= F+B"
    saved = pair + whole - 3 * weights
    if kind == "dualpipe":
        pairs_most = count - ranks - 1
        busy = work - pairs_most * durations.hidden
        holds = enough and count % 2 == 0 and steady
        return Closed((ranks / 2 - 1) * saved, busy, ranks + 1, f"M even, {domain}", holds)
    pairs_most = 2 * (count - ranks) - 1
    busy = work - pairs_most * durations.hidden / 2
    return Closed((ranks - 1) / 2 * saved, busy, ranks + 0.5, domain, enough and steady)
