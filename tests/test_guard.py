"""What a guard makes of a step's losses and gradients: in one process, with losses that are made up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsv3_train.runtime import distributed
from dsv3_train.runtime.exits import CORRUPT
from dsv3_train.training.losses import Losses
from parity import tiny


@pytest.fixture
def guarded(tmp_path):
    """Makes a guard, and the list of its incidents, for a recipe; `gradients` are those of its trainer."""
    distributed.prepare_import("cpu")
    from dsv3_train.training.guard import Guard

    gradients = torch.zeros(16)
    chunk = SimpleNamespace(buffers=[SimpleNamespace(grad_data=gradients)], expert_parallel_buffers=[])
    trainer = SimpleNamespace(models=[], chunks=[chunk])

    def make(**sections):
        incidents: list[tuple[str, str]] = []
        guard = Guard(tiny(**sections), tmp_path, trainer, None, lambda *incident: incidents.append(incident))
        return guard, incidents

    make.gradients = gradients
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield make
    torch.distributed.destroy_process_group()


def test_a_batch_that_gives_nan_both_times_is_not_corruption(guarded):
    from dsv3_train.training.guard import Verdict

    def nan() -> Losses:
        guarded.gradients.fill_(math.nan)
        return Losses(float("nan"), None, float("nan"))  # new ones: for `==` of tuples one object equals itself

    guard, incidents = guarded(faults={"rerun_interval": 1})
    assert guard.gradients(nan, 1, 0, 8)[1] is Verdict.PASS_OVER
    assert [kind for kind, _ in incidents] == ["not finite"]

    for second in (
        Losses(1.0, None, math.nan),
        Losses(math.nan, math.nan, math.nan),
        Losses(-math.nan, None, math.nan),
    ):
        results = iter([nan(), second])
        with pytest.raises(SystemExit) as stop:
            guard.gradients(results.__next__, 2, 8, 8)
        assert stop.value.code == CORRUPT
        assert "computed the same step twice, with different bits" in incidents[-1][1]


SIZES = {
    "constants": [{"constant": 8, "until": "11 steps"}, {"constant": 32}],
    "by_steps": [{"linear": [8, 64], "until": "15 steps"}, {"constant": 64}],
    "by_tokens": [{"linear": [8, 64], "until": 8192}, {"constant": 64, "until": 32768}, {"constant": 128}],
}


@pytest.mark.parametrize("batches", [1, 2, 3, 12])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_batches_before_a_spike_are_the_plans(guarded, sizes, batches):
    duration = {"duration": "30 steps"}
    guard, _ = guarded(schedule={"batch_size": sizes}, training=duration, faults={"spike_batches": batches})
    plan = list(guard._schedules.plan())
    for index, (step, first, size) in enumerate(plan):
        skip = guard.spike(first, size, step + 1)
        assert (skip.first, skip.last) == (plan[max(0, index - batches + 1)][1], first + size - 1)
        assert guard.spike(first, size, step + 1, batches=1).first == first


def test_batches_before_a_spike_off_the_plan_are_counted_by_steps(guarded):
    """As after a resume with more samples behind it than the plan has: step 13 is the second of 32."""
    guard, _ = guarded(schedule={"batch_size": SIZES["constants"]}, faults={"spike_batches": 3})
    skip = guard.spike(5032, 32, 13)
    assert (skip.first, skip.last) == (4992, 5063)


def test_a_rise_that_lasts_is_a_spike_only_for_a_while(guarded):
    """70 losses near 2.0, then 1000 near 2.5: of these one is rolled back, and those after it are trained on."""
    from dsv3_train.training.guard import Verdict

    guard, incidents = guarded(faults={"spike": 12.0, "spike_window": 64, "max_rollbacks": 1})
    rolled_back = []
    for step in range(1, 1071):
        loss = (2.0 if step <= 70 else 2.5) + 0.01 * math.sin(step)
        _, verdict = guard.gradients(lambda loss=loss: Losses(loss, None, 1.0), step, 8 * step, 8)
        if verdict is Verdict.ROLL_BACK:
            rolled_back.append(step)
            assert loss not in guard.kept(0).losses
            guard.skips.add(guard.spike(8 * step, 8, step), write=False)
        else:
            assert guard.kept(0).losses[-1] == loss
    assert rolled_back == [71]
    assert {kind for kind, _ in incidents} == {"spike"}
    assert 8 < len(incidents) <= 32  # half a window
    assert incidents[-1][1].startswith(f"step {71 + len(incidents)}: ")
