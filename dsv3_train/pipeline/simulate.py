"""A schedule run with durations instead of kernels: when each operation runs, what waits, what is held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_train.pipeline.operations import Compute, Exchange, Message, Op, Schedule, Transfer, made, needed

Duration = Callable[[tuple[Op, ...]], float]
"""Time of one computation: of one operation, or of the F and the B of a pair together."""


class Span(NamedTuple):
    """One computation in time, simulated or measured."""

    start: float
    end: float
    ops: tuple[Op, ...]


Timeline = tuple[tuple[Span, ...], ...]
"""Per rank, in order."""


class Deadlock(Exception):
    """Ranks that wait for each other; the message names what each of them waits for."""


@dataclass(frozen=True)
class Run:
    """A timeline of a schedule, simulated (in the unit of the durations, from 0) or measured."""

    timeline: Timeline

    @property
    def span(self) -> float:
        """From the first computation to the last one's end, over all ranks: the time of a global batch."""
        return max(spans[-1].end for spans in self.timeline) - min(spans[0].start for spans in self.timeline)

    @property
    def busy(self) -> list[float]:
        """Time computing, per rank."""
        return [sum(span.end - span.start for span in spans) for spans in self.timeline]

    @property
    def bubbles(self) -> list[float]:
        """Idle part of the span, per rank."""
        return [1 - busy / self.span for busy in self.busy]

    @property
    def bubble_fraction(self) -> float:
        """Idle part of the span on the rank that idles most."""
        return max(self.bubbles)


def simulate(schedule: Schedule, duration: Duration, latency: float = 0.0, blocking: bool = False) -> Run:
    """When every computation runs, if each starts as soon as its rank and its input are there.

    Args:
        duration: time of a computation; see durations.py.
        latency: time that a message takes from one rank to another.
        blocking: an exchange holds its rank until every partner has posted its end, and `latency` longer, as
            `batch_isend_irecv` with a wait does. Otherwise transfers cost a rank no time, and messages leave as
            soon as they are made.

    Raises:
        Deadlock: no rank can go on.
    """
    ranks, stages = [_Rank() for _ in schedule.events], schedule.stages
    posted: defaultdict[tuple[tuple[int, int], bool], list[float]] = defaultdict(list)
    """Per channel (from, to) and end (sending or not): when each transfer was posted, in order."""
    there: dict[Message, tuple[float, int]] = {}
    """When and on which rank each message was made."""
    sleepers: dict[Message, int] = {}
    """The rank that waits for a message not yet made."""

    def compute(number: int, ops: tuple[Op, ...]) -> bool:
        rank = ranks[number]
        start = rank.now
        for op in ops:
            message = needed(op, stages)
            if message is None:
                continue
            if message not in there:
                sleepers[message] = number
                return False
            if not blocking:
                when, maker = there[message]
                start = max(start, when if maker == number else when + latency)
        rank.now = start + duration(ops)
        rank.spans.append(Span(start, rank.now, ops))
        for op in ops:
            message = made(op)
            if message is not None:
                there[message] = rank.now, number
                if message in sleepers:
                    runnable.append(sleepers.pop(message))
        return True

    def exchange(number: int, transfers: tuple[Transfer, ...]) -> bool:
        rank = ranks[number]
        if rank.posts is None:
            rank.posts = []
            for sends, peer, _ in transfers:
                channel = (number, peer) if sends else (peer, number)
                mine = posted[channel, sends]
                rank.posts.append((posted[channel, not sends], len(mine)))
                mine.append(rank.now)
                runnable.append(peer)
        done = rank.now
        for theirs, index in rank.posts:
            if index >= len(theirs):
                return False
            done = max(done, theirs[index])
        rank.posts = None
        rank.now = done + latency
        return True

    runnable = list(range(len(ranks)))
    while runnable:
        number = runnable.pop()
        rank, events = ranks[number], schedule.events[number]
        while rank.at < len(events):
            event = events[rank.at]
            if isinstance(event, Compute):
                if not compute(number, event.ops):
                    break
            elif blocking and not exchange(number, event.transfers):
                break
            rank.at += 1
    stuck = {n: schedule.events[n][rank.at] for n, rank in enumerate(ranks) if rank.at < len(schedule.events[n])}
    if stuck:
        raise Deadlock("; ".join(f"rank {n} waits at {_told(event)}" for n, event in stuck.items()))
    return Run(tuple(tuple(rank.spans) for rank in ranks))


class _Rank:
    """How far a rank is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at = 0
        self.spans: list[Span] = []
        self.posts: list[tuple[list[float], int]] | None = None
        """Of the exchange that it waits in: the times of the other ends, and its place among them."""


def _told(event: Compute | Exchange) -> str:
    if isinstance(event, Compute):
        return " & ".join(f"{op.kind} of stage {op.stage}, micro-batch {op.micro_batch}" for op in event.ops)
    ends = (f"{'send to' if t.sends else 'receive from'} {t.peer}: {tuple(t.message)}" for t in event.transfers)
    return f"an exchange ({', '.join(ends)})"


def in_flight(schedule: Schedule, until_weights: bool = False) -> list[float]:
    """Peak of forwards without their backward, per rank, in activations of 1/ranks of the model.

    Args:
        until_weights: count a forward until its W where B is split, not only until its I.
    """
    return _peaks(schedule, (lambda op: schedule.ranks / schedule.stages), 1.0 if until_weights else 0.0)


def peak_memory(schedule: Schedule, stage_bytes: Callable[[int], float], kept_for_weights: float = 1.0) -> list[float]:
    """Peak of held activations, per rank, in bytes.

    Args:
        stage_bytes: activations that one micro-batch's forward leaves on a stage.
        kept_for_weights: the part of them that I leaves for W.
    """
    return _peaks(schedule, (lambda op: stage_bytes(op.stage)), kept_for_weights)


def _peaks(schedule: Schedule, size: Callable[[Op], float], kept_for_weights: float) -> list[float]:
    part = {"F": 1.0, "B": -1.0, "I": kept_for_weights - 1.0, "W": -kept_for_weights}
    peaks = []
    for events in schedule.events:
        held = peak = 0.0
        for event in events:
            if isinstance(event, Compute):
                for op in event.ops:  # of a pair the forward comes first
                    held += part[op.kind] * size(op)
                    peak = max(peak, held)
        peaks.append(peak)
    return peaks
