"""Counted activation bytes against those that a GPU held (tools/activation_bytes.py; one H100 as a rank of EP64)."""

from __future__ import annotations

import pytest

from dsv3_train.planner.activations import moe_layer_bytes
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import NO_FP8

ALL = "[layernorm, mla_up_proj, moe_act]"
# GiB a layer of 4, 4096 tokens.
MEASURED = {
    ("none", "[]"): 1.759,
    ("none", ALL): 1.002,
    # The router padded each rank's rows for each expert to a multiple of 16 then.
    ("blockwise", "[]"): 1.502,
    ("blockwise", "[layernorm]"): 1.382,
    ("blockwise", "[mla_up_proj]"): 0.990,
    ("blockwise", "[moe_act]"): 1.429,
    ("blockwise", ALL): 0.821,
}

PADDED = 1 + 7.5 / (4096 * 8 / 256)
"""Rows, on average, per row of the 128 that a rank has for an expert."""


def counted(*overrides: str) -> dict[str, int]:
    return moe_layer_bytes(load("dsv3_671b_2048xh800", ["data.train=[{path: unused}]", *NO_FP8, *overrides]), 4096)


@pytest.mark.parametrize(("fp8", "recompute"), MEASURED)
def test_counted_is_measured(fp8, recompute):
    held = counted(f"precision.fp8={fp8}", f"training.recompute={recompute}")
    padded = 1.0 if fp8 == "none" else PADDED
    found = sum(count * (padded if "experts" in name else 1.0) for name, count in held.items()) / 2**30
    assert found == pytest.approx(MEASURED[fp8, recompute], rel=0.01)


FP8 = ("precision.fp8=blockwise",)


def test_the_reports_options():
    """Each saves what its format says, and together they stay under 0.65 GiB."""
    plain, report = counted(*FP8), counted(*FP8, "precision.swiglu_input=fp8", "precision.attention_output=e5m6")
    name = "SwiGLU inputs of experts"
    assert report[name] / plain[name] == pytest.approx((1 + 1 / 128) / 2)
    name = "attention output"
    assert plain[name] - report[name] == pytest.approx(4096 * 128 * 128 * (0.5 - 1 / 128), rel=1e-6)
    assert sum(report.values()) < 0.65 * 2**30
