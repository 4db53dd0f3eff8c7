"""A measured global batch as the usual pipeline picture, beside what its schedule gives by simulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from dsv3_train.pipeline.draw.panel import Panel
from dsv3_train.pipeline.operations import Message, Op, Schedule, made, needed
from dsv3_train.pipeline.simulate import Run, Span, Timeline, simulate

_LATE, _SLOW = 0.05, 1.3
"""Of the span, and times the median rank: from here on a rank is named."""


@dataclass(frozen=True)
class Measured:
    """One global batch of one pipeline."""

    schedule: Schedule
    timeline: Timeline
    """Milliseconds, from the first computation of any rank, on one clock."""

    @property
    def run(self) -> Run:
        return Run(self.timeline)

    @property
    def simulated(self) -> Run:
        """With the mean measured time of each kind of computation on each stage, and messages that take no time."""
        times: dict[Any, list[float]] = defaultdict(list)
        for spans in self.timeline:
            for span in spans:
                times[_by_stage(span.ops)].append(span.end - span.start)
        means = {key: mean(values) for key, values in times.items()}
        return simulate(self.schedule, lambda ops: means[_by_stage(ops)])

    @property
    def ideal(self) -> Run:
        """The schedule's own: each kind of computation takes the same time on every stage."""
        times: dict[Any, list[float]] = defaultdict(list)
        for spans in self.timeline:
            for span in spans:
                times[_by_kind(span.ops)].append(span.end - span.start)
        means = {key: mean(values) for key, values in times.items()}
        return simulate(self.schedule, lambda ops: means[_by_kind(ops)])

    @property
    def late(self) -> list[float]:
        """Per rank: time in which its next computation's inputs were made and it was free, but did not begin it:
        messages on their way, or the rank was elsewhere."""
        there = {
            message: span.end
            for spans in self.timeline
            for span in spans
            for message in map(made, span.ops)
            if message is not None
        }
        return [sum(self._late(spans, there)) for spans in self.timeline]

    def _late(self, spans: tuple[Span, ...], there: dict[Message, float]) -> list[float]:
        free, found = 0.0, []
        for span in spans:
            inputs = [there[message] for message in self._needed(span.ops) if message in there]
            found.append(max(0.0, span.start - max([free, *inputs])))
            free = span.end
        return found

    def _needed(self, ops: tuple[Op, ...]) -> list[Message]:
        found = (needed(op, self.schedule.stages) for op in ops)
        return [message for message in found if message is not None]


def _by_stage(ops: tuple[Op, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((op.kind, op.stage) for op in ops)


def _by_kind(ops: tuple[Op, ...]) -> tuple[str, ...]:
    return tuple(op.kind for op in ops)


def measured(schedule: Schedule, per_rank: list[tuple[Span, ...]], offsets: list[float]) -> Measured:
    """From what each pipeline rank recorded, in seconds on its own clock, and how far that is ahead."""
    origin = min(spans[0].start - ahead for spans, ahead in zip(per_rank, offsets, strict=True))

    def ms(time: float, ahead: float) -> float:
        return (time - ahead - origin) * 1e3

    timeline = tuple(
        tuple(Span(ms(span.start, ahead), ms(span.end, ahead), span.ops) for span in spans)
        for spans, ahead in zip(per_rank, offsets, strict=True)
    )
    return Measured(schedule, timeline)


def of_pipelines(timed: dict[str, Any]) -> list[tuple[list[int], Measured]]:
    """Of every pipeline of several ranks in `pipeline.json`: its ranks, and the global batch whose time is the median.

    One stage alone is no pipeline, and leaves no spans where its micro-batches are CUDA graphs.
    """
    from dsv3_train.pipeline.generate import build, whole_backwards
    from dsv3_train.recipe.chunks import SCHEDULED

    found = []
    for pipeline in timed["pipelines"]:
        ranks = list(pipeline["ranks"])
        if len(ranks) == 1:
            continue
        schedule = build(timed["kind"], len(ranks), timed["micro_batches"], timed["virtual"], timed["pairs"])
        if timed["kind"] in SCHEDULED and not timed["defer"]:
            schedule = whole_backwards(schedule)
        batches = [
            measured(schedule, [_spans(spans) for spans in per_rank], pipeline["ahead"])
            for per_rank in zip(*pipeline["steps"], strict=True)
        ]
        found.append((ranks, typical(batches)))
    return found


def _spans(raw: Any) -> tuple[Span, ...]:
    """As they come out of JSON."""
    return tuple(Span(start, end, tuple(Op(*op) for op in ops)) for start, end, ops in raw)


def typical(batches: list[Measured]) -> Measured:
    """The one whose time is the median."""
    return sorted(batches, key=lambda one: one.run.span)[(len(batches) - 1) // 2]


def figures(one: Measured, ranks: list[int]) -> dict[str, Any]:
    """Bubbles measured, simulated and ideal, and times per rank; `ranks`: global ranks of the pipeline, in order."""
    run, busy, late = one.run, one.run.busy, one.late
    return {
        "schedule": one.schedule.kind,
        "micro_batches": sum(one.schedule.micro_batches),
        "span_ms": run.span,
        "bubble_fraction": run.bubble_fraction,
        "simulated_bubble_fraction": one.simulated.bubble_fraction,
        "ideal_bubble_fraction": one.ideal.bubble_fraction,
        "mean_bubble_fraction": mean(run.bubbles),
        "ranks": [
            {"rank": rank, "busy_ms": busy[i], "bubble": run.bubbles[i], "late_ms": late[i], "ms": _means(spans)}
            for i, (rank, spans) in enumerate(zip(ranks, one.timeline, strict=True))
        ],
        "findings": findings(one, ranks),
    }


def _means(spans: tuple[Span, ...]) -> dict[str, float]:
    """Mean time per kind of computation: F, B, I, W, F&B."""
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        times["&".join(_by_kind(span.ops))].append(span.end - span.start)
    return {kind: mean(values) for kind, values in times.items()}


def findings(one: Measured, ranks: list[int]) -> list[dict[str, Any]]:
    """Ranks that the others wait for: slow in computing, or late to begin."""
    run, found = one.run, []
    for name, values, told in (
        ("slow rank", run.busy, "computes"),
        ("late rank", one.late, "does not begin, with its inputs made,"),
    ):
        for i, value in enumerate(values):
            others = median([*values[:i], *values[i + 1 :]]) if len(values) > 1 else value
            lost = value - others
            if lost > _LATE * run.span and value > _SLOW * others:
                text = f"rank {ranks[i]} {told} for {value:.1f} ms where the median of the others is {others:.1f} ms"
                found.append({"kind": name, "rank": ranks[i], "ms": lost, "text": f"{text}{_slowest(one, i, name)}"})
    return sorted(found, key=lambda row: -row["ms"])


def _slowest(one: Measured, rank: int, name: str) -> str:
    """Its one computation that took longest beyond the rest of its kind, where that explains it."""
    if name != "slow rank":
        return ""
    spans = one.timeline[rank]
    usual = {
        kind: median(s.end - s.start for s in spans if _by_kind(s.ops) == kind) for kind in map(_by_kind, _ops(spans))
    }
    worst = max(spans, key=lambda span: span.end - span.start - usual[_by_kind(span.ops)])
    beyond = worst.end - worst.start - usual[_by_kind(worst.ops)]
    if beyond < 0.5 * (one.run.busy[rank] - min(one.run.busy)):
        return ""
    ops = " & ".join(f"{op.kind} of stage {op.stage}, micro-batch {op.micro_batch}" for op in worst.ops)
    return f"; {beyond:.1f} ms of it in {ops}"


def _ops(spans: tuple[Span, ...]) -> list[tuple[Op, ...]]:
    return [span.ops for span in spans]


def panels(one: Measured, name: str, ranks: list[int]) -> list[Panel]:
    """Measured, simulated with the same times, and the schedule's ideal: to draw below each other."""
    runs: tuple[tuple[str, Callable[[], Run]], ...] = (
        ("measured", lambda: one.run),
        ("simulated with the measured mean times, messages taking none", lambda: one.simulated),
        ("ideal: every stage takes the same times", lambda: one.ideal),
    )
    told = f"ranks {', '.join(map(str, ranks))}" if len(ranks) <= 8 else f"{len(ranks)} ranks"
    title = f"{name}: {one.schedule.kind}, {told}, {sum(one.schedule.micro_batches)} micro-batches"
    return [Panel(f"{title}, {what}", one.schedule, run(), "ms") for what, run in runs]
