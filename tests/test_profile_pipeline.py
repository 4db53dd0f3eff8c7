"""The measured pipeline: from spans on several clocks to bubbles, and ranks that are slow or late by name."""

from __future__ import annotations

import pytest

from dsv3_train.pipeline.durations import Durations
from dsv3_train.pipeline.generate import build
from dsv3_train.pipeline.operations import KINDS
from dsv3_train.pipeline.simulate import Span, simulate
from dsv3_train.profiling.pipeline_view import figures, findings, measured


def batch(kind: str, duration=None, ranks: int = 4, change=lambda rank, span: span, ahead=(0.0,) * 4):
    """A simulated global batch as if it had been measured, in seconds."""
    schedule = build(kind, ranks, 8)
    run = simulate(schedule, duration or Durations(F=0.01, I=0.01, W=0.01).of(schedule))
    spans = [
        tuple(change(rank, Span(s.start + skew, s.end + skew, s.ops)) for s in timeline)
        for rank, (timeline, skew) in enumerate(zip(run.timeline, ahead, strict=True))
    ]
    return measured(schedule, spans, list(ahead)), run


@pytest.mark.parametrize("kind", KINDS)
def test_a_simulated_batch_measures_as_simulated_on_any_clocks(kind):
    one, run = batch(kind, ahead=(0.0, 100.0, -3.0, 5e3))
    told = figures(one, [0, 1, 2, 3])
    assert told["span_ms"] == pytest.approx(1e3 * run.span)
    for key in ("bubble_fraction", "simulated_bubble_fraction", "ideal_bubble_fraction"):
        assert told[key] == pytest.approx(run.bubble_fraction)
    assert [rank["late_ms"] for rank in told["ranks"]] == pytest.approx([0.0] * 4, abs=1e-6)
    assert told["findings"] == []


def test_unequal_stages_are_in_the_simulation_and_not_in_the_ideal():
    schedule = build("1f1b", 4, 8)
    equal = Durations(F=0.01, I=0.01, W=0.01)
    one, run = batch("1f1b", equal.with_head(schedule, 1.0).of(schedule))
    told = figures(one, [4, 5, 6, 7])
    assert told["simulated_bubble_fraction"] == pytest.approx(run.bubble_fraction)
    assert told["ideal_bubble_fraction"] == pytest.approx(simulate(schedule, equal.of(schedule)).bubble_fraction)
    (found,) = told["findings"]
    assert (found["kind"], found["rank"]) == ("slow rank", 7)


def test_one_slow_computation_is_named():
    def slow(rank, span):
        op = span.ops[0]
        long = rank == 2 and op.kind == "F" and op.micro_batch == 7
        return Span(span.start, span.end + 0.2 * long, span.ops)

    (found,) = [row for row in findings(batch("1f1b", change=slow)[0], [0, 1, 2, 3]) if row["kind"] == "slow rank"]
    assert found["rank"] == 2
    assert found["text"].endswith("200.0 ms of it in F of stage 2, micro-batch 7")


def test_a_rank_that_begins_late_is_named():
    def late(rank, span):
        # Everything on rank 1 from its third micro-batch on is held up by 0.1 s, as by a slow host.
        held = 0.1 if rank == 1 and span.start > 0.03 else 0.0
        return Span(span.start + held, span.end + held, span.ops)

    found = findings(batch("1f1b", change=late)[0], [0, 1, 2, 3])
    assert [(row["kind"], row["rank"]) for row in found] == [("late rank", 1)]
    assert found[0]["ms"] == pytest.approx(100, rel=0.2)
