"""The simulator against closed formulas, hand-made cases and its own other mode; memory; durations of single stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv3_train.pipeline.compare import Conditions, compare
from dsv3_train.pipeline.durations import UNIT, Durations
from dsv3_train.pipeline.formulas import closed
from dsv3_train.pipeline.generate import build, whole_backwards
from dsv3_train.pipeline.operations import KINDS, Compute, Exchange, Op
from dsv3_train.pipeline.simulate import Deadlock, Run, Span, in_flight, peak_memory, simulate

DURATIONS = [
    Durations(1, 1, 1),
    Durations(2, 2, 1),
    Durations(1, 1, 0.5),
    Durations(1, 1.2, 0.8),
    Durations(1, 0.8, 1.2),
    Durations(1.5, 1.5, 1),
    Durations(1, 1, 1, FB=2.5),
    Durations(2, 2, 1, FB=3),
    Durations(1, 1, 1, FB=3.5),
    Durations(1, 1, 1, B=1.8),
]


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        ("1f1b", {}, 500),
        ("interleaved", {}, 200),
        ("interleaved", {"virtual": 3}, 200),
        ("interleaved", {"pairs": True}, 100),
        ("zb1p", {}, 200),
        ("zbv", {}, 100),
        ("dualpipe", {}, 50),
        ("dualpipev", {}, 100),
    ],
)
def test_formulas_and_simulation_agree_wherever_the_formulas_hold(kind, options, least):
    held = 0
    for ranks in (1, 2, 3, 4, 5, 6, 8, 12):
        if kind == "dualpipe" and ranks % 2:
            continue
        counts = {1, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1, 3 * ranks, 4 * ranks} - {0}
        for micro_batches in counts:
            schedule = build(kind, ranks, micro_batches, **options)
            peak = max(in_flight(schedule))
            for durations in DURATIONS:
                formula = closed(schedule, durations, options.get("pairs", False))
                if not formula.holds:
                    continue
                held += 1
                run = simulate(schedule, durations.of(schedule))
                assert max(run.span - busy for busy in run.busy) == pytest.approx(formula.bubble, abs=1e-9)
                assert run.bubble_fraction == pytest.approx(formula.bubble_fraction, abs=1e-9)
                assert peak == pytest.approx(formula.peak_in_flight)
    assert held >= least


def test_formulas_are_not_claimed_where_they_fail():
    # W > I, M < 2P, odd M: the simulation is worse than the formula, which says that it does not hold.
    for kind, micro_batches, durations in (
        ("dualpipe", 16, Durations(1, 0.8, 1.2)),
        ("dualpipe", 7, UNIT),
        ("dualpipe", 17, UNIT),
        ("zb1p", 16, Durations(1, 0.8, 1.2)),
        ("zbv", 7, UNIT),
    ):
        schedule = build(kind, 8, micro_batches)
        formula, run = closed(schedule, durations), simulate(schedule, durations.of(schedule))
        assert not formula.holds
        assert max(run.span - busy for busy in run.busy) > formula.bubble + 0.1


def test_the_table_of_activations_at_equal_ranks():
    """P = 16, M = 64, in activations of 1/P of the model (DualPipe's README and Megatron's interleaving)."""
    held = {one.schedule.kind: one.in_flight for one in compare(16, 64, Conditions(UNIT))[0]}
    assert {kind: max(per_rank) for kind, per_rank in held.items()} == {
        "1f1b": 16,
        "interleaved": 23.5,
        "zb1p": 16,
        "zbv": 16,
        "dualpipe": 17,
        "dualpipev": 16.5,
    }
    for kind, flat in (("1f1b", False), ("interleaved", False), ("zbv", True), ("dualpipe", True), ("dualpipev", True)):
        assert (min(held[kind]) == max(held[kind])) == flat


def test_two_ranks_by_hand():
    # 1F1B, F = 1, B = 2, a message takes 0.5.
    schedule = build("1f1b", 2, 2)
    run = simulate(schedule, Durations(1, 1, 1).of(schedule), latency=0.5)
    assert [[span[:2] for span in spans] for spans in run.timeline] == [
        [(0, 1), (1, 2), (5, 7), (8, 10)],  # B0 after rank 1's at 4.5
        [(1.5, 2.5), (2.5, 4.5), (4.5, 5.5), (5.5, 7.5)],
    ]
    assert run.span == 10
    assert run.bubbles == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "interleaved"])
def test_blocking_exchanges_cost_nothing_at_no_latency(kind):
    """Batches are where both ranks are free. (Interleaved chunks leave some messages no such moment.)"""
    for ranks in (1, 2, 4, 6, 8):
        if kind == "dualpipe" and ranks % 2:
            continue
        for micro_batches in (1, ranks, 2 * ranks, 2 * ranks + 1, 4 * ranks):
            schedule = build(kind, ranks, micro_batches)
            free = simulate(schedule, UNIT.of(schedule)).span
            assert simulate(schedule, UNIT.of(schedule), blocking=True).span == pytest.approx(free)


def test_latency_costs_the_more_the_more_chunks_a_rank_has():
    times = {}
    for kind in ("interleaved", "dualpipe", "dualpipev"):
        schedule = build(kind, 8, 64, pairs=kind == "interleaved")
        d = Durations(2, 2, 1, FB=3).of(schedule)
        times[kind] = simulate(schedule, d, latency=0.4).span / simulate(schedule, d).span
        assert simulate(schedule, d, latency=0.4, blocking=True).span >= simulate(schedule, d, latency=0.4).span
    assert times["dualpipe"] < times["dualpipev"] < times["interleaved"]


def test_a_heavy_head_costs_bidirectional_dualpipe_half():
    """Both end ranks hold the last stage of one direction, and see half of the micro-batches there."""
    light, _ = compare(8, 64, Conditions(UNIT))
    heavy, _ = compare(8, 64, Conditions(UNIT, head=0.5))
    grown = {a.schedule.kind: b.run.span - a.run.span for a, b in zip(light, heavy, strict=True)}
    per_step = 64 * 3 * 0.5
    assert grown["1f1b"] > 0.95 * per_step
    assert grown["dualpipe"] < 0.6 * per_step


def test_never_slower_than_one_forward_one_backward():
    for ranks in (2, 4, 6, 8):
        for micro_batches in range(1, 2 * ranks + 3):
            plain = build("1f1b", ranks, micro_batches)
            limit = simulate(plain, UNIT.of(plain)).span
            for kind in ("zb1p", "zbv", "dualpipe", "dualpipev"):
                schedule = build(kind, ranks, micro_batches)
                assert simulate(schedule, UNIT.of(schedule)).span <= limit


def test_durations_of_single_stages():
    schedule = build("dualpipev", 2, 4)
    d = Durations(4, 4, 2, FB=8, stages={3: {"F": 5}, 1: {"FB": 7, "W": 3}}).of(schedule)
    seen = {}
    for events in schedule.events:
        for event in events:
            if isinstance(event, Compute):
                key = tuple((op.kind, op.stage) for op in event.ops)
                seen[key] = d(event.ops)
    assert seen[("F", 0),] == 2  # half of a rank's layers
    assert seen[("F", 3),] == 2.5
    assert seen[("W", 1),] == 1.5
    assert seen[("B", 2),] == 3
    assert seen[("F", 0), ("B", 3)] == 4
    assert seen[("F", 3), ("B", 0)] == pytest.approx(4.4)  # 8 of 10 parts, as any pair
    assert seen[("F", 1), ("B", 2)] == 3.5
    measured = replace(Durations(4, 4, 2), per_stage=True).of(schedule)
    first = next(event for event in schedule.events[0] if isinstance(event, Compute))
    assert measured(first.ops) == 4


def test_pairs_of_fast_stages_take_time():
    schedule = build("dualpipe", 8, 20)
    fast = {0: {"F": 0.2, "I": 0.2, "W": 0.1}, 7: {"F": 0.3, "I": 0.3, "W": 0.2}}
    run = simulate(schedule, Durations(2, 2, 1, FB=3, stages=fast).of(schedule))
    assert all(span.end > span.start for spans in run.timeline for span in spans)
    assert all(0 <= bubble < 1 for bubble in run.bubbles)


def test_no_pair_hides_the_head():
    """The times of docs/pipeline.md; a stage's own times take the head on top."""
    by_kind = {one.schedule.kind: one for one in compare(8, 64, Conditions(Durations(2, 2, 1, FB=3), head=0.25))[0]}
    assert [by_kind[kind].run.span for kind in ("dualpipe", "dualpipev")] == [257, 298.5]
    schedule = by_kind["dualpipe"].schedule
    forward, backward = Op("F", 0, 7, 0), Op("B", 1, 7, 0)
    for own, alone, pair in (({}, 2.5, 4.25), ({"F": 1.0}, 1.5, 3.65), ({"FB": 4.0}, 2.5, 5.25)):
        d = Durations(2, 2, 1, FB=3, stages={7: own}).with_head(schedule, 0.25).of(schedule)
        assert d((forward,)) == alone
        assert d((backward,)) == 3.75
        assert d((forward, backward)) == pytest.approx(pair)


def test_memory_by_bytes_of_stages():
    schedule = build("1f1b", 2, 4)
    assert peak_memory(schedule, lambda stage: [10, 100][stage]) == [20, 100]
    zero_bubble = build("zb1p", 4, 8)
    all_of_it, part, none = (
        max(peak_memory(zero_bubble, lambda stage: 1.0, kept_for_weights=kept)) for kept in (1.0, 0.5, 0.0)
    )
    assert none <= part <= all_of_it == 4
    assert none == max(in_flight(zero_bubble))


def test_whole_backwards_hold_no_more():
    for kind in ("zb1p", "zbv", "dualpipe", "dualpipev"):
        schedule = build(kind, 4, 8)
        assert max(in_flight(whole_backwards(schedule))) <= max(in_flight(schedule, until_weights=True))


def test_a_deadlock_names_what_ranks_wait_at():
    schedule = build("1f1b", 2, 1)
    kept = tuple(event for event in schedule.events[0] if not isinstance(event, Exchange))
    broken = replace(schedule, events=(kept, schedule.events[1]))
    with pytest.raises(Deadlock, match="rank 1 waits at an exchange"):
        simulate(broken, UNIT.of(broken), blocking=True)


def test_a_measured_timeline_has_the_same_figures():
    spans = build("1f1b", 1, 2).events[0]
    ops = [event.ops for event in spans if isinstance(event, Compute)]
    times = [(10.0, 11.0), (11.5, 13.0), (13.0, 14.0), (15.0, 15.5)]
    run = Run((tuple(Span(*time, op) for time, op in zip(times, ops, strict=True)),))
    assert run.span == 5.5
    assert run.bubble_fraction == pytest.approx(1 - 4.0 / 5.5)
