"""Every layout trains as one process does: losses of six steps, every gradient of the first, final weights.

FP32 over gloo. Tolerance 1e-5 relative, for sums that run in another order; expert counts are exact.
"""

from __future__ import annotations

import pytest

from parity import assert_same, tiny

LAYOUTS = {
    "dp2": ({"world_size": 2}, {}),
    "ep2": ({"world_size": 2, "expert": 2}, {}),
    "ep2_allgather": ({"world_size": 2, "expert": 2, "dispatcher": "allgather"}, {}),
    "pp2": ({"world_size": 2, "pipeline": 2}, {"layout": "Ett|ttmL"}),
    "pp2_uneven": ({"world_size": 2, "pipeline": 2}, {"layout": "Ettt|tmL"}),
    "pp2_vpp2": (
        {"world_size": 2, "pipeline": 2},
        {"layout": "Et|t|t|tmL", "virtual_stages": 2, "schedule": "interleaved"},
    ),
    "pp2_ep2": ({"world_size": 4, "pipeline": 2, "expert": 2}, {"layout": "Ett|ttmL"}),
    "tp2": ({"world_size": 2, "tensor": 2}, {}),
    "tp2_ep2": ({"world_size": 2, "tensor": 2, "expert": 2}, {}),
    "tp2_etp2": ({"world_size": 2, "tensor": 2, "expert_tensor": 2}, {}),
}


@pytest.mark.parametrize(
    ("layout", "zero1"),
    [
        # Under tensor parallelism without ZeRO-1 too with `make test-all`.
        pytest.param(
            layout, zero1, id=layout + "-zero1" * zero1, marks=[pytest.mark.slow] * (layout[:2] == "tp" and not zero1)
        )
        for layout in LAYOUTS
        for zero1 in (False, True)
    ],
)
def test_layout(run, layout, zero1):
    parallel, pipeline = LAYOUTS[layout]
    got = run(tiny(parallel={**parallel, "zero1": zero1}, pipeline=pipeline))
    assert_same(got, run(tiny()))


@pytest.mark.parametrize("layout", ["dp2", "pp2_ep2"])
def test_overlapped_reduction(run, layout):
    parallel, pipeline = LAYOUTS[layout]
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "zero1": True}
    got = run(tiny(parallel={**parallel, **overlap}, pipeline=pipeline))
    assert_same(got, run(tiny()))


@pytest.mark.parametrize("modules", [["layernorm", "mla_up_proj", "moe_act"], ["mlp", "core_attn"], ["moe"], ["full"]])
def test_recompute(run, modules):
    got = run(tiny(training={"recompute": modules}))
    assert_same(got, run(tiny()))


def test_two_sequences_per_micro_batch(run):
    """Losses are means over tokens and the balance loss is per sequence, whatever the micro-batch size."""
    assert_same(run(tiny(training={"micro_batch_size": 2})), run(tiny()))


def test_a_wrong_gradient_is_seen(run):
    """The comparison itself: another seed of weights must not pass for the same run."""
    with pytest.raises(AssertionError):
        assert_same(run(tiny(training={"seed": 4321})), run(tiny()))
