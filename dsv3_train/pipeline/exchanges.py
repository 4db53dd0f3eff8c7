"""When messages travel, for an order of computations that says nothing about it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from dsv3_train.pipeline.durations import UNIT
from dsv3_train.pipeline.operations import Compute, Event, Exchange, Message, Schedule, Transfer, made, needed
from dsv3_train.pipeline.simulate import Span, simulate


def with_exchanges(schedule: Schedule) -> Schedule:
    """The same computations with the exchanges that they need.

    A message gets one moment of a simulated run (F = I = W), at which both its ranks exchange it: the first one, from
    when it is made to when it is needed, at which neither of them computes, so that none waits for the other; else when
    it is made. All ranks keep the order of these moments. So the earliest exchange not yet done is never held up by a
    later one: no deadlock, even if every exchange waits for its partners; and of two messages from one rank to another
    the one sent first is received first. Transfers between the same two computations are posted together.
    """
    timeline, stages = simulate(schedule, UNIT.of(schedule)).timeline, schedule.stages
    sources: dict[Message, tuple[int, float]] = {
        message: (rank, span.end)
        for rank, spans in enumerate(timeline)
        for span in spans
        for message in map(made, span.ops)
        if message is not None
    }
    starts = [[span.start for span in spans] for spans in timeline]
    transfers: list[list[tuple[float, Message, Transfer]]] = [[] for _ in timeline]
    for rank, spans in enumerate(timeline):
        for span in spans:
            for op in span.ops:
                message = needed(op, stages)
                if message is None or sources[message][0] == rank:
                    continue
                source, ready = sources[message]
                both = [(timeline[r], starts[r]) for r in (source, rank)]
                moment = _free_moment(ready, span.start, both)
                transfers[source].append((moment, message, Transfer(True, rank, message)))
                transfers[rank].append((moment, message, Transfer(False, source, message)))
    return replace(schedule, events=tuple(_merged(*both) for both in zip(timeline, transfers, strict=True)))


def _free_moment(earliest: float, latest: float, ranks: list[tuple[tuple[Span, ...], list[float]]]) -> float:
    """The first time within bounds at which no rank is within a computation; `earliest` if there is none."""
    moment, moved = earliest, True
    while moved and moment <= latest:
        moved = False
        for spans, starts in ranks:
            before = bisect_left(starts, moment) - 1  # the last computation that began sooner
            if before >= 0 and spans[before].end > moment:
                moment, moved = spans[before].end, True
    return moment if moment <= latest else earliest


def _merged(spans: tuple[Span, ...], transfers: list[tuple[float, Message, Transfer]]) -> tuple[Event, ...]:
    """Computations and exchanges in order of time; at one time exchanges come first, in the order of their messages."""
    events: list[Event] = []
    ordered = sorted(transfers)
    at = 0
    for span in spans:
        batch = []
        while at < len(ordered) and ordered[at][0] <= span.start:
            batch.append(ordered[at][2])
            at += 1
        if batch:
            events.append(Exchange(tuple(batch)))
        events.append(Compute(span.ops))
    if at < len(ordered):
        events.append(Exchange(tuple(transfer for _, _, transfer in ordered[at:])))
    return tuple(events)
