"""Emulated FP8: operands against the reference's bits, each product against the reference's, each layer of a model."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.precision.emulated import BlockScaled
from dsv3_train.precision.reference import BLOCK, COLUMN_TILE, TILE, block_gemm, quantise
from parity import assembled, batch, tiny

KINDS = ["linear", "grouped", "parallel"]


@pytest.fixture(scope="module")
def trainer():
    """A model in emulated FP8."""
    with assembled(tiny(precision={"fp8": "emulated"})) as parts:
        yield parts


def spread(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values that differ by 6 decades from row to row, an outlier here and there, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.where(torch.rand(rows, columns, generator=generator) < 0.01, 100.0, 1.0)
    x *= 10 ** (-6 * torch.rand(rows, 1, generator=generator))
    x[rows // 2] = 0
    return x


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("shape", [(300, 260), (128, 256), (5, 40)], ids=str)
def test_operands_equal_the_reference(shape, power_of_2):
    arithmetic = BlockScaled(power_of_2)
    x = spread(*shape, seed=0)
    rounded = x.bfloat16()

    def reference(part: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
        return quantise(part, tile, power_of_2=power_of_2).dequantise()

    assert torch.equal(arithmetic.features(x), reference(rounded, TILE))
    assert torch.equal(arithmetic.features(x.view(1, *shape))[0], reference(rounded, TILE))
    assert torch.equal(arithmetic.weight(x), reference(rounded, BLOCK))
    stack = torch.stack([x, x.flip(0) * 3])
    expected = torch.stack([reference(matrix, BLOCK) for matrix in stack.bfloat16()])
    assert torch.equal(arithmetic.weight(stack), expected)
    counts = [shape[0] // 2, 0, shape[0] - shape[0] // 2]
    grouped = torch.cat([reference(part, COLUMN_TILE) for part in rounded.split(counts) if len(part)])
    assert torch.equal(arithmetic.tokens(x, counts), grouped)


def test_no_tokens():
    arithmetic = BlockScaled(True)
    assert arithmetic.tokens(torch.empty(0, 8), [0, 0]).shape == (0, 8)
    assert arithmetic.features(torch.empty(0, 8)).shape == (0, 8)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Row by row, so that a row a million times smaller counts as much."""
    return bool(((got - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_product_is_the_references(trainer, kind, power_of_2):
    """Fprop, Dgrad and Wgrad of codes and scales; and none of them is FP32's."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from dsv3_train.model.local_layers import set_arithmetic
    from dsv3_train.model.weight_gradients import grouped_linear, linear

    arithmetic = BlockScaled(power_of_2)
    counts = [150, 0, 170] if kind == "grouped" else [320]
    x, dy = spread(320, 200, seed=1).requires_grad_(), spread(320, 136, seed=2)
    weight = torch.randn(len(counts), 136, 200, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[:, :128, :128] *= 1000  # blocks of differing scale
    weight.requires_grad_()
    if kind == "grouped":
        y = grouped_linear(x, weight, counts, arithmetic)
    elif kind == "linear":
        y = linear(x, weight[0], arithmetic)
    else:
        layer = ColumnParallelLinear(200, 136, config=trainer.config, init_method=torch.nn.init.zeros_, bias=False)
        del layer.weight
        layer.weight = weight[0]
        set_arithmetic(torch.nn.ModuleList([layer]), arithmetic)
        y, _ = layer(x)
    dx, dw = torch.autograd.grad(y, [x, weight], dy)
    x, y, weight = x.detach(), y.detach(), weight.detach()

    def product(a: torch.Tensor, b: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
        """Of [m, k] and [n, k], both rounded to BF16 before: [m, n]."""
        a, b = (quantise(m.bfloat16(), t, power_of_2=power_of_2) for m, t in ((a, TILE), (b, tile)))
        return block_gemm(a, b)

    parts = list(zip(x.split(counts), dy.split(counts), weight, strict=True))
    expected = {
        "Fprop": (y, torch.cat([product(a, w, BLOCK) for a, _, w in parts])),
        "Dgrad": (dx, torch.cat([product(b, w.t(), BLOCK) for _, b, w in parts])),
        "Wgrad": (dw, torch.stack([product(b.t(), a.t(), TILE) for a, b, _ in parts])),
    }
    plain = {
        "Fprop": torch.cat([a @ w.t() for a, _, w in parts]),
        "Dgrad": torch.cat([b @ w for _, b, w in parts]),
        "Wgrad": torch.stack([b.t() @ a for a, b, _ in parts]),
    }
    for name, (got, reference) in expected.items():
        if name != "Wgrad":  # results rounded to BF16; a sum in another order may fall on the other side
            assert torch.equal(got, got.bfloat16().float()), name
            assert float((got == reference.bfloat16().float()).float().mean()) > 0.99, name
        assert close(got, reference, 2e-6 if name == "Wgrad" else 2.0**-8), name
        error = (got - plain[name]).norm() / plain[name].norm()
        assert 0.005 < error < 0.1, (name, float(error))  # 3 bits of mantissa; BF16 alone is off by 0.002


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_deferred_is_the_same_bits(trainer, kind):
    from dsv3_train.model import weight_gradients

    counts = [3, 0, 4]
    shape = (5, 6) if kind == "linear" else (3, 5, 6)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.main_grad = torch.zeros(shape)
    x, dy = torch.randn(7, 6), torch.randn(7, 5)

    def backward() -> None:
        arithmetic = BlockScaled(True)
        if kind == "linear":
            weight_gradients.linear(x, weight, arithmetic).backward(dy)
        else:
            weight_gradients.grouped_linear(x, weight, counts, arithmetic).backward(dy)

    backward()
    with weight_gradients.deferred("op"):
        backward()
    assert weight_gradients.compute("op") == 1
    assert torch.equal(weight.main_grad, weight.grad)


def quantised_weights(trainer, monkeypatch) -> set[str]:
    """Names of the parameters that are quantised in a forward and backward pass of a model."""
    seen: set[int] = set()
    plain = BlockScaled.weight

    def weight(self, tensor: torch.Tensor) -> torch.Tensor:
        seen.add(tensor.data_ptr())
        return plain(self, tensor)

    monkeypatch.setattr(BlockScaled, "weight", weight)
    (model,) = trainer.models
    data = batch(trainer.recipe, 0, 0)
    model(
        data["tokens"], data["position_ids"], None, labels=data["labels"], loss_mask=data["loss_mask"]
    ).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.data_ptr() in seen}


def test_every_linear_of_a_model_and_nothing_else(trainer, monkeypatch):
    """As Megatron-core has it on a GPU: embedding, head and router stay out, MTP's projection is in."""
    matrices = {name for name, parameter in trainer.models[0].named_parameters() if parameter.dim() > 1}
    out = {"embedding.word_embeddings.weight", "output_layer.weight"}
    out |= {name for name in matrices if name.endswith("mlp.router.weight")}
    quantised = quantised_weights(trainer, monkeypatch)
    assert quantised == matrices - out
    assert "mtp.layers.0.eh_proj.weight" in quantised


def test_other_models_stay_as_they_are(trainer, monkeypatch):
    """The arithmetic belongs to a model, not to the process."""
    from dsv3_train.training.assemble import assemble

    assert not quantised_weights(assemble(tiny(), "cpu"), monkeypatch)
