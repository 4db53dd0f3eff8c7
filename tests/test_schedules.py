"""Schedules over consumed tokens: values, steps, and resuming anywhere."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import pytest

from dsv3_train.errors import UserError
from dsv3_train.optim.schedules import Schedules
from dsv3_train.recipe.load import load

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")
LENGTH = 32  # tokens per sequence
RAMP = "schedule.batch_size=[{linear: [8, 24], until: 64K}, {constant: 24}]"


def schedules(*overrides: str) -> Schedules:
    return Schedules(load(TINY, overrides))


def walk(plan: Schedules) -> list[tuple[int, int, int]]:
    """The plan step by step, from `at` alone."""
    steps, sample = [], 0
    for step in range(plan.total_steps):
        size = plan.at(sample).batch_size
        steps.append((step, sample, size))
        sample += size
    return steps


def test_values_are_those_before_the_step():
    plan = schedules("schedule.lr=[{linear: [0, 1], until: 10 steps}, {constant: 1}]")
    rates = [plan.at(first).lr for _, first, _ in plan.plan()]
    assert rates[:11] == [n / 10 for n in range(11)]
    assert set(rates[10:]) == {1.0}


def test_a_piece_until_tokens_follows_the_tokens():
    plan = schedules("schedule.lr=[{linear: [0, 1], until: 2560}, {cosine: [1, 0.1], until: 5120}, {constant: 0.1}]")
    at = {tokens: plan.at(tokens // LENGTH).lr for tokens in (0, 640, 2560, 2560 + 640, 2560 + 1280, 5120, 10240)}
    assert at[0] == 0
    assert at[640] == 0.25
    assert at[2560] == 1
    assert at[2560 + 640] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-12)
    assert at[2560 + 1280] == pytest.approx(0.55, rel=1e-12)
    assert at[5120] == at[10240] == 0.1


def test_a_piece_until_steps_rises_evenly_while_the_batch_grows():
    plan = schedules("schedule.lr=[{linear: [0, 1], until: 50 steps}, {constant: 1}]", RAMP)
    steps = list(plan.plan())
    assert steps[0][2] < steps[49][2]
    assert [plan.at(first).lr for _, first, _ in steps[:51]] == pytest.approx([n / 50 for n in range(51)], rel=1e-12)


def test_units_meet_exactly():
    # 10 steps of 8 sequences, then a piece in tokens: it begins where those steps end.
    plan = schedules("schedule.lr=[{constant: 0, until: 10 steps}, {linear: [0, 1], until: 5120}, {constant: 1}]")
    assert plan.at(80).lr == 0
    assert plan.at(120).lr == 0.5  # halfway from 2560 to 5120 tokens
    # And the other way: 2570 tokens end within step 10, so the next piece begins with step 11.
    plan = schedules("schedule.lr=[{constant: 7, until: 2570}, {linear: [0, 1], until: 21 steps}, {constant: 1}]")
    assert [plan.at(8 * step).lr for step in (10, 11, 16, 21)] == [7, 0, 0.5, 1]


def test_batch_sizes_are_rounded_down_to_what_the_ranks_can_run():
    plan = schedules("parallel.world_size=4", "training.micro_batch_size=2", "training.duration=300 steps", RAMP)
    sizes = [size for _, _, size in plan.plan()]
    assert set(sizes) == {8, 16, 24}
    assert sizes == sorted(sizes)
    for _, first, size in plan.plan():
        exact = min(8 + 16 * first * LENGTH / 64_000, 24)
        assert size <= exact < size + 8


def test_interleaving_rounds_to_whole_groups_of_micro_batches():
    overrides = ["parallel={world_size: 2, pipeline: 2}", "pipeline={schedule: interleaved, virtual_stages: 2}"]
    assert {size % 2 for _, _, size in schedules(*overrides, RAMP).plan()} == {0}


def test_batch_pieces_in_steps():
    plan = schedules(
        "schedule.batch_size=[{constant: 8, until: 3 steps}, {linear: [10, 20], until: 8 steps}, {constant: 9}]"
    )
    assert [size for _, _, size in plan.plan()][:10] == [8, 8, 8, 10, 12, 14, 16, 18, 9, 9]


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.duration=100 steps"],
        ["training.duration=100 steps", RAMP],
        ["training.duration=99999", RAMP],
        ["training.duration=99999", "schedule.batch_size=[{cosine: [8, 24], until: 64K}, {linear: [24, 5]}]"],
        ["training.duration=99999", "schedule.batch_size=[{linear: [24, 3], until: 61 steps}, {constant: 4}]"],
        ["training.duration=1"],
    ],
)
def test_the_plan_is_what_steps_one_by_one_give(overrides):
    plan = schedules(*overrides)
    steps = list(plan.plan())
    assert steps == walk(plan)
    last, first, size = steps[-1]
    assert plan.total_steps == last + 1
    assert plan.total_samples == first + size
    assert [plan.step_of(first) for _, first, _ in steps] == list(range(len(steps)))


def test_the_run_ends_with_the_step_that_reaches_its_tokens():
    plan = schedules("training.duration=2561")  # 8 sequences of 32 are 256 tokens a step
    assert (plan.total_steps, plan.total_samples, plan.total_tokens) == (11, 88, 2561)
    plan = schedules("training.duration=10 steps")
    assert (plan.total_steps, plan.total_samples, plan.total_tokens) == (10, 80, 2560)


def test_resuming_in_the_middle_of_a_ramp_goes_on_exactly():
    plan = schedules("training.duration=99999", RAMP)
    steps = list(plan.plan())
    assert len({size for _, _, size in steps}) == 17
    for step, first, _ in steps:
        assert list(itertools.islice(plan.plan(first), 40)) == steps[step : step + 40]


def test_resuming_between_steps_after_a_change_of_layout():
    # 84 sequences lie within the eleventh step of 8.
    steps = list(schedules().plan(84))
    assert steps[0] == (11, 84, 8)
    assert steps[-1][0] == 99


def test_a_shortened_run_keeps_its_beginning():
    long, short = schedules(RAMP), schedules(RAMP, "training.duration=5 steps")
    assert list(short.plan()) == list(long.plan())[:5]
    assert [short.at(first) for _, first, _ in short.plan()] == [long.at(first) for _, first, _ in short.plan()]


def test_a_piece_that_ends_before_it_begins():
    # Neither end is wrong by itself: that 1K tokens pass before step 10 only the batch size tells.
    with pytest.raises(UserError, match=r"schedule\.lr\.1\.until: 1000 is not after .* 2560 tokens"):
        schedules("schedule.lr=[{constant: 1, until: 10 steps}, {constant: 2, until: 1K}, {constant: 3}]")


def test_a_last_piece_that_ends_before_the_run():
    with pytest.raises(UserError, match=r"schedule\.lr\.0\.until: 25000 is before the end of the run"):
        schedules("schedule.lr=[{constant: 1, until: 25K}]")
    schedules("schedule.lr=[{constant: 1, until: 25.6K}]")


def test_the_longest_published_run_is_planned_at_once():
    recipe = load("dsv3_671b_2048xh800")
    start = time.process_time()
    plan = Schedules(recipe)
    assert sum(1 for _ in plan.plan()) == plan.total_steps
    assert time.process_time() - start < 1.0
