"""Counted activation bytes against those that a GPU held (tools/activation_bytes.py; one H100 as a rank of EP64)."""

from __future__ import annotations

import pytest

from dsv3_train.planner.activations import moe_layer_bytes
from dsv3_train.recipe.load import load

ALL = "[layernorm, mla_up_proj, moe_act]"
# GiB a layer of 4, 4096 tokens.
MEASURED = {
    ("none", "[]"): 1.759,
    ("none", ALL): 1.002,
    # With 6% more rows in the experts, which the router padded then: 0.03 of these.
    ("blockwise", "[]"): 1.502,
    ("blockwise", "[layernorm]"): 1.382,
    ("blockwise", "[mla_up_proj]"): 0.990,
    ("blockwise", "[moe_act]"): 1.429,
    ("blockwise", ALL): 0.821,
}


def counted(*overrides: str) -> dict[str, int]:
    off = ("precision.fp8_dispatch=false", "precision.swiglu_input=full", "precision.attention_output=full")
    return moe_layer_bytes(load("dsv3_671b_2048xh800", ["data.train=[{path: unused}]", *off, *overrides]), 4096)


@pytest.mark.parametrize(("fp8", "recompute"), MEASURED)
def test_counted_is_measured(fp8, recompute):
    found = sum(counted(f"precision.fp8={fp8}", f"training.recompute={recompute}").values()) / 2**30
    padding = 0.0 if fp8 == "none" else 0.03
    assert found == pytest.approx(MEASURED[fp8, recompute] - padding, rel=0.01)


def test_the_reports_options():
    """Each saves what its format says, and together they stay under 0.65 GiB."""
    plain, report = counted(), counted("precision.swiglu_input=fp8", "precision.attention_output=e5m6")
    name = "SwiGLU inputs of experts"
    assert report[name] / plain[name] == pytest.approx((1 + 1 / 128) / 2)
    name = "attention output"
    assert plain[name] - report[name] == pytest.approx(4096 * 128 * 128 * (0.5 - 1 / 128), rel=1e-6)
    assert sum(report.values()) < 0.65 * 2**30
