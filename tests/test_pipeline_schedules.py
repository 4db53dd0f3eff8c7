"""Schedules as data: equal to published orders, sound for any ranks and micro-batches, and mutants found."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_train.pipeline.check import Unsound, check, findings
from dsv3_train.pipeline.draw.panel import chunk, label
from dsv3_train.pipeline.generate import build, forward_only, whole_backwards
from dsv3_train.pipeline.operations import KINDS, Compute, Event, Exchange, Op, Schedule, Transfer

REFERENCE = json.loads((Path(__file__).parent / "reference" / "dualpipe.json").read_text(encoding="utf-8"))
"""What the published classes do, recorded by tools/record_dualpipe.py."""


def as_recorded(event: Event, ranks: int) -> str:
    if isinstance(event, Compute):
        return label(event.ops, ranks)

    def end(transfer: Transfer) -> str:
        kind, direction, stage, micro_batch = transfer.message
        own = stage if transfer.sends else stage + (1 if kind == "F" else -1)
        mine = chunk(Op(kind, direction, own, micro_batch), ranks)
        return f"{'>' if transfer.sends else '<'}{transfer.peer}:{kind}{mine}.{micro_batch}"

    return "[" + ",".join(map(end, event.transfers)) + "]"


def recorded(case: str) -> list[list[str]]:
    kind, ranks, micro_batches = case.split()
    schedule = build(kind, int(ranks), int(micro_batches))
    return [[as_recorded(event, int(ranks)) for event in events] for events in schedule.events]


@pytest.mark.parametrize("case", REFERENCE["lists"])
def test_dual_schedules_do_what_the_published_classes_do(case):
    assert recorded(case) == REFERENCE["lists"][case]


def test_dual_schedules_do_what_the_published_classes_do_in_many_cases():
    digests = REFERENCE["digests"]
    assert len([case for case in digests if case.startswith("dualpipe ")]) >= 30
    assert len(digests) >= 70
    for case, expected in digests.items():
        text = "\n".join(" ".join(events) for events in recorded(case))
        assert hashlib.sha256(text.encode()).hexdigest() == expected, case


def computations(schedule: Schedule, rank: int) -> list[tuple[Op, ...]]:
    return [event.ops for event in schedule.events[rank] if isinstance(event, Compute)]


def test_one_forward_one_backward_and_zero_bubble_by_hand():
    """Three ranks, four micro-batches: weight gradients wait as many turns as the rank's number."""

    def names(kind: str) -> list[str]:
        schedule = build(kind, 3, 4)
        return [" ".join(f"{op.kind}{op.micro_batch}" for (op,) in computations(schedule, rank)) for rank in range(3)]

    assert names("1f1b") == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert names("zb1p") == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_zbv_is_the_order_of_torch(ranks):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    names = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    for micro_batches in (1, ranks, 2 * ranks - 1, 2 * ranks, 4 * ranks + 1):
        schedule = build("zbv", ranks, micro_batches)
        torch_s = SimpleNamespace(
            pp_group_size=ranks, _n_microbatches=micro_batches, n_local_stages=2, num_stages=2 * ranks
        )
        for rank in range(ranks):
            actions = schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations(torch_s, rank)
            expected = [
                (Op(names[action.computation_type.name], 0, action.stage_index, action.microbatch_index),)
                for action in actions
                if action is not None
            ]
            assert computations(schedule, rank) == expected


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_interleaved_is_the_order_of_megatron(ranks, virtual, pairs):
    megatron = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    for micro_batches in (ranks, 3 * ranks):
        turns = megatron.get_schedule_table(micro_batches, virtual, ranks)
        schedule = build("interleaved", ranks, micro_batches, virtual, pairs)
        for rank in range(ranks):
            group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
            communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
            total, _, ahead, _ = megatron.get_pp_rank_microbatches(
                micro_batches, virtual, ranks, False, pairs, p2p_communicator=communicator
            )
            got = computations(schedule, rank)
            flat = [op for ops in got for op in ops]
            forwards = [op for op in flat if op.kind == "F"]
            assert forwards == [Op("F", 0, c * ranks + rank, m) for m, c in turns]
            backwards = [op for op in flat if op.kind == "B"]
            assert backwards == [Op("B", 0, (virtual - 1 - c) * ranks + rank, m) for m, c in turns]
            assert next((k for k, ops in enumerate(got) if ops[-1].kind == "B"), total) == ahead - (
                0 if pairs or ahead == total else -1
            )
            assert sum(len(ops) == 2 for ops in got) == (total - ahead if pairs else 0)


def sweep(kind: str, ranks: range) -> int:
    cases = 0
    for p in ranks:
        if kind == "dualpipe" and p % 2:
            continue
        for m in range(1, 4 * p + 1):
            schedule = build(kind, p, m)
            assert findings(schedule) == [], (kind, p, m)
            cases += 1
            if m in (1, 2 * p - 1, 4 * p):
                check(forward_only(schedule), forward_only=True)
                check(whole_backwards(schedule))
    return cases


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_sound(kind):
    assert sweep(kind, range(1, 9)) == (80 if kind == "dualpipe" else 144)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_sound_up_to_sixteen_ranks(kind):
    assert sweep(kind, range(9, 17)) == (208 if kind == "dualpipe" else 400)


def test_interleaved_with_pairs_and_more_chunks_is_sound():
    for ranks in (1, 2, 3, 4):
        for micro_batches in range(1, 4 * ranks + 1):
            for virtual in (2, 3, 4):
                assert findings(build("interleaved", ranks, micro_batches, virtual, pairs=True)) == []


def test_micro_batches_of_each_direction():
    assert build("dualpipe", 4, 9).micro_batches == (5, 4)
    assert build("dualpipe", 4, 1).micro_batches == (1, 0)
    assert build("dualpipev", 4, 9).micro_batches == (9,)


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "zbv"])
def test_a_tensor_leaves_right_after_it_is_made(kind):
    """So that, where exchanges run beside computations, no schedule waits for more than its simulation does."""
    for ranks, micro_batches in ((2, 5), (4, 9), (8, 32)):
        for events in build(kind, ranks, micro_batches).events:
            for before, exchange in pairwise(events):
                if isinstance(exchange, Exchange):
                    for transfer in exchange.transfers:
                        assert not transfer.sends or makes(before, transfer.message)


def test_transformed_schedules_keep_the_order():
    schedule = build("dualpipe", 4, 10)
    for rank in range(4):
        ops = [op for ops in computations(schedule, rank) for op in ops]
        forwards = [op for ops in computations(forward_only(schedule), rank) for op in ops]
        assert forwards == [op for op in ops if op.kind == "F"]
        whole = [op for ops in computations(whole_backwards(schedule), rank) for op in ops]
        assert whole == [op._replace(kind="B") if op.kind == "I" else op for op in ops if op.kind != "W"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dualpipe", 3, 8), "even, not 3"),
        (("1f1b", 0, 8), "at least 1 rank"),
        (("zbv", 4, 0), "at least 1 rank and 1 micro-batch"),
        (("gpipe", 4, 8), "no schedule 'gpipe'"),
        (("interleaved", 4, 8, 1), "at least 2 chunks"),
        (("dualpipe", 4, 8, 2, True), "interleaved schedule alone"),
    ],
)
def test_what_there_is_no_schedule_for(arguments, said):
    with pytest.raises(ValueError, match=said):
        build(*arguments)


# Mutants: one rank's events changed in one place.


def with_events(schedule: Schedule, rank: int, events: list[Event]) -> Schedule:
    return replace(schedule, events=(*schedule.events[:rank], tuple(events), *schedule.events[rank + 1 :]))


MUTATED = [
    ("1f1b", 4, 6),
    ("interleaved", 3, 6),
    ("zb1p", 4, 6),
    ("zbv", 3, 7),
    ("dualpipe", 4, 10),
    ("dualpipev", 3, 7),
]


@pytest.fixture(params=MUTATED, ids=lambda case: case[0])
def schedule(request) -> Schedule:
    return build(*request.param)


def places(schedule: Schedule, kind: type):
    for rank, events in enumerate(schedule.events):
        for at, event in enumerate(events):
            if isinstance(event, kind):
                yield rank, at, list(events)


def test_a_lost_or_doubled_event_is_found(schedule):
    for rank, at, events in places(schedule, Compute | Exchange):
        assert findings(with_events(schedule, rank, events[:at] + events[at + 1 :])), (rank, at)
        assert findings(with_events(schedule, rank, events[: at + 1] + events[at:])), (rank, at)


def test_an_operation_on_another_rank_is_found(schedule):
    for rank, at, events in places(schedule, Compute):
        other = (rank + 1) % schedule.ranks
        moved = with_events(schedule, rank, events[:at] + events[at + 1 :])
        assert findings(with_events(moved, other, [*moved.events[other], events[at]])), (rank, at)


def test_tensors_swapped_within_a_batch_are_found(schedule):
    """Two tensors of one shape on one channel without tags: nothing else would notice."""
    swaps = 0
    for rank, at, events in places(schedule, Exchange):
        transfers = events[at].transfers
        channels = defaultdict(list)
        for number, transfer in enumerate(transfers):
            channels[transfer.peer, transfer.sends].append(number)
        for numbers in channels.values():
            for a, b in pairwise(numbers):
                changed = list(transfers)
                changed[a], changed[b] = changed[b], changed[a]
                found = findings(
                    with_events(schedule, rank, [*events[:at], Exchange(tuple(changed)), *events[at + 1 :]])
                )
                assert any("received as" in finding for finding in found), (rank, at)
                swaps += 1
    assert swaps or not schedule.kind.startswith("dual")


def test_a_late_receive_and_an_early_send_are_found(schedule):
    for rank, at, events in places(schedule, Exchange):
        for transfer in events[at].transfers:
            kept = tuple(other for other in events[at].transfers if other is not transfer)
            rest = [*events[:at], *([Exchange(kept)] if kept else []), *events[at + 1 :]]
            message, alone = transfer.message, Exchange((transfer,))
            if transfer.sends:
                made_at = next(k for k, event in enumerate(rest) if makes(event, message))
                found = findings(with_events(schedule, rank, [*rest[:made_at], alone, *rest[made_at:]]))
                assert any("before it is made" in finding for finding in found), (rank, at)
            else:
                used_at = next(k for k, event in enumerate(rest) if uses(event, message))
                found = findings(with_events(schedule, rank, [*rest[: used_at + 1], alone, *rest[used_at + 1 :]]))
                assert any("is there" in finding for finding in found), (rank, at)


def makes(event: Event, message) -> bool:
    kinds = "F" if message.kind == "F" else "BI"
    return isinstance(event, Compute) and any(op.kind in kinds and op[1:] == message[1:] for op in event.ops)


def uses(event: Event, message) -> bool:
    stage = message.stage + (1 if message.kind == "F" else -1)
    kinds = "F" if message.kind == "F" else "BI"
    return isinstance(event, Compute) and any(
        op.kind in kinds and op[1:] == (message.direction, stage, message.micro_batch) for op in event.ops
    )


def test_computations_out_of_order_are_found(schedule):
    """F of a later micro-batch first: its input, or its turn in the channel, is another's."""
    swaps = 0
    for rank, at, events in places(schedule, Compute):
        later = next((k for k in range(at + 1, len(events)) if isinstance(events[k], Compute)), None)
        if later is None:
            continue
        a, b = events[at].ops[-1], events[later].ops[0]
        depends = a.kind + b.kind in ("FB", "FI", "IW") and a[1:] == b[1:]
        if depends:
            events[at], events[later] = events[later], events[at]
            found = findings(with_events(schedule, rank, events))
            assert any("without its" in finding or "is there" in finding for finding in found), (rank, at)
            swaps += 1
    assert swaps


def test_a_pair_whose_halves_need_each_other_is_found():
    schedule = build("1f1b", 1, 1)
    (forward,), (backward,) = computations(schedule, 0)
    found = findings(with_events(schedule, 0, [Compute((forward, backward))]))
    assert any("without its F" in finding for finding in found)


@pytest.mark.parametrize("case", [("dualpipe", 4, 8), ("dualpipe", 8, 16), ("dualpipev", 4, 8)])
def test_transfers_posted_one_by_one_deadlock(case):
    """The published batches are needed: in their order alone, blocking transfers wait for each other."""
    schedule = build(*case)
    single = [
        [
            part
            for event in events
            for part in ([event] if isinstance(event, Compute) else [Exchange((end,)) for end in event.transfers])
        ]
        for events in schedule.events
    ]
    with pytest.raises(Unsound, match="deadlock"):
        check(replace(schedule, events=tuple(map(tuple, single))))
