"""Schedules by name: kind, ranks and micro-batches -> the events of every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dsv3_train.pipeline import orders
from dsv3_train.pipeline.dual import dual_events
from dsv3_train.pipeline.exchanges import with_exchanges
from dsv3_train.pipeline.operations import KINDS, Compute, Event, Exchange, Op, Schedule, Transfer


def build(kind: str, ranks: int, micro_batches: int, virtual: int = 2, pairs: bool = False) -> Schedule:
    """The schedule of one global batch.

    Micro-batches that a schedule's regular form needs and that are not there (of fewer than twice the ranks, or of a
    number that does not divide) are left out of it: the order of the others is kept.

    Args:
        kind: one of `KINDS`.
        ranks: of the pipeline.
        micro_batches: per pipeline. dualpipe feeds half of them in at each end; of an odd number direction 0 takes
            one more.
        virtual: chunks per rank of the interleaved schedule; the others have their own number.
        pairs: the interleaved schedule with F&B pairs (Megatron's `overlap_moe_expert_parallel_comm`). The dual ones
            always have them, the others cannot.

    Raises:
        ValueError: there is no such schedule.
    """
    if kind not in KINDS:
        raise ValueError(f"no schedule {kind!r}; there are {', '.join(KINDS)}")
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"a pipeline has at least 1 rank and 1 micro-batch, not {ranks} and {micro_batches}")
    if kind == "dualpipe" and ranks % 2:
        raise ValueError(f"dualpipe pairs ranks from both ends: their number must be even, not {ranks}")
    if kind == "interleaved" and virtual < 2:
        raise ValueError(f"the interleaved schedule has at least 2 chunks per rank, not {virtual}")
    if pairs and kind != "interleaved":
        raise ValueError(f"pairs are an option of the interleaved schedule alone, not of {kind}")
    schedule = Schedule(kind, ranks, virtual if kind == "interleaved" else 1, (micro_batches,), ())
    if kind == "dualpipe":
        halves = ((micro_batches + 1) // 2, micro_batches // 2)
        regular = [dual_events("dualpipe", ranks, rank, max(ranks, halves[0])) for rank in range(ranks)]
        return _without_absent(replace(schedule, micro_batches=halves), regular)
    if kind == "dualpipev":
        regular = [dual_events("dualpipev", ranks, rank, max(2 * ranks, micro_batches)) for rank in range(ranks)]
        return _without_absent(schedule, regular)
    ordered = [[Compute(ops) for ops in _order(schedule, rank, pairs)] for rank in range(ranks)]
    return with_exchanges(_without_absent(schedule, ordered))


def _order(schedule: Schedule, rank: int, pairs: bool) -> orders.Order:
    kind, ranks, (count,) = schedule.kind, schedule.ranks, schedule.micro_batches
    if kind == "1f1b":
        return orders.one_forward_one_backward(ranks, rank, count)
    if kind == "zb1p":
        return orders.zero_bubble_h1(ranks, rank, count)
    if kind == "zbv":
        return orders.zero_bubble_v(ranks, rank, max(2 * ranks - 1, count))
    return orders.interleaved(ranks, rank, -(-count // ranks) * ranks, schedule.virtual, pairs)


def forward_only(schedule: Schedule) -> Schedule:
    """Its forwards alone, and the exchanges of activations: an evaluation."""
    events = [
        _filtered(rank, lambda op: op.kind == "F", lambda end: end.message.kind == "F") for rank in schedule.events
    ]
    return replace(schedule, events=tuple(events))


def whole_backwards(schedule: Schedule) -> Schedule:
    """The same with weight gradients computed together with those of inputs: B in place of I, no W."""
    events = [_filtered(rank, lambda op: op.kind != "W", lambda end: True) for rank in schedule.events]
    return replace(schedule, events=tuple(tuple(map(_whole, rank)) for rank in events))


def _whole(event: Event) -> Event:
    if isinstance(event, Exchange):
        return event
    return Compute(tuple(op._replace(kind="B") if op.kind == "I" else op for op in event.ops))


def _without_absent(schedule: Schedule, regular: list[list]) -> Schedule:
    """Events of the micro-batches that there are."""
    counts = schedule.micro_batches
    events = (
        _filtered(
            rank,
            lambda op: op.micro_batch < counts[op.direction],
            lambda end: end.message.micro_batch < counts[end.message.direction],
        )
        for rank in regular
    )
    return replace(schedule, events=tuple(events))


def _filtered(
    events: list[Event] | tuple[Event, ...], keeps: Callable[[Op], bool], carries: Callable[[Transfer], bool]
) -> tuple[Event, ...]:
    """Events without some of their operations and transfers; those that nothing is left of go."""
    left: list[Event] = []
    for event in events:
        if isinstance(event, Compute):
            ops = tuple(filter(keeps, event.ops))
            if ops:
                left.append(event if len(ops) == len(event.ops) else Compute(ops))
        else:
            transfers = tuple(filter(carries, event.transfers))
            if transfers:
                left.append(event if len(transfers) == len(event.transfers) else Exchange(transfers))
    return tuple(left)
