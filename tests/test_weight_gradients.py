"""Weight gradients apart from those of inputs: the same numbers, later."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.runtime import distributed


@pytest.fixture(scope="module")
def weights():
    distributed.prepare_import("cpu")
    from dsv3_train.model import weight_gradients

    return weight_gradients


def parameter(*shape: int) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.randn(*shape))
    made.main_grad = torch.zeros(*shape)
    return made


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_deferred_equals_at_once(weights, kind):
    torch.manual_seed(0)
    counts = [3, 0, 4]
    weight = parameter(5, 6) if kind == "linear" else parameter(3, 5, 6)
    x = torch.randn(7, 6, requires_grad=True)

    def forward() -> torch.Tensor:
        return weights.linear(x, weight) if kind == "linear" else weights.grouped_linear(x, weight, counts)

    parts = [x] if kind == "linear" else x.split(counts)
    matrices = [weight] if kind == "linear" else weight.unbind(0)
    plain = torch.cat([part @ w.t() for part, w in zip(parts, matrices, strict=True)])
    torch.testing.assert_close(forward(), plain)
    plain.square().sum().backward()
    expected, x_expected = weight.grad.clone(), x.grad.clone()

    for key in (None, "op"):
        x.grad = weight.grad = None
        weight.main_grad.zero_()
        with weights.deferred(key):
            forward().square().sum().backward()
        torch.testing.assert_close(x.grad, x_expected)
        if key is None:
            torch.testing.assert_close(weight.grad, expected)
            continue
        assert weight.grad is None
        assert weights.pending() == ["op"]
        assert not weight.main_grad.any()
        assert weights.compute("op") == 1
        torch.testing.assert_close(weight.main_grad, expected)
        assert not weight.main_grad.requires_grad  # or it would keep every input alive
        assert weights.pending() == []


def test_the_patch_is_still_needed(weights):
    """Megatron-core's local linears have no way of their own to defer: when they do, the patch can go."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for linear in (ColumnParallelLinear, RowParallelLinear):  # 0.16's RowParallelLinear has none
        backward_dw = getattr(linear, "backward_dw", lambda _: None)
        assert backward_dw(None) is None, "take the patch out of model/weight_gradients.py"
