"""Activations in tiles: the reference's values, in the stated number of bytes."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.precision.caches import hold
from dsv3_train.precision.formats import E4M3, E5M6
from dsv3_train.precision.reference import TILE, quantise
from dsv3_train.precision.tiles import of_message, to_message, to_tiles

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M6], ids=["e4m3", "e5m6"])


def data(rows: int = 40, columns: int = 384) -> torch.Tensor:
    """BF16 values over 12 decades, with zeros, a tile of zeros, and the smallest and largest there are."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 6, rows)[:, None]
    x[3, :128], x[5, 7] = 0.0, 0.0
    x[7, 128:256] = 1e-39
    x[8, 200] = 3e38
    return x.bfloat16().float()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [384, 200, 64])
def test_values_are_the_references(fmt, dtype, columns):
    x = data(columns=384)[:, :columns].contiguous().to(dtype)
    expected = quantise(x, TILE, fmt, power_of_2=True).dequantise()
    got = to_tiles(x, fmt).values(dtype)
    assert got.dtype == dtype
    assert torch.equal(got.float(), expected)  # also in BF16: nothing is rounded
    assert torch.equal(got.float().signbit(), x.signbit())


def test_what_was_dispatched_is_quantised_again_without_loss():
    """In the same tiles with power-of-2 scales; FP32 scales round a second time, to other values."""
    sent = to_tiles(data(), E4M3).values(torch.float32)
    assert torch.equal(quantise(sent, TILE, E4M3, power_of_2=True).dequantise(), sent)
    again = quantise(sent, TILE, E4M3, power_of_2=False).dequantise()
    usual = sent.abs() > 1e-30
    assert float(((again - sent) / sent)[usual].abs().mean()) > 0.01


@FORMATS
def test_bytes(fmt):
    tiles = to_tiles(data(), fmt)
    assert tiles.codes.nbytes == 40 * 384 * (1 if fmt is E4M3 else 1.5)
    assert tiles.exponents.nbytes == 40 * 3


def test_a_message_is_codes_and_exponents():
    x = data()
    message = to_message(x)
    assert message.shape == (40, 384 + 3)
    assert torch.equal(of_message(message, 384).values(torch.float32), to_tiles(x).values(torch.float32))


def test_nan_stays():
    x = data()
    x[1, 1] = float("nan")
    assert to_tiles(x).values(torch.float32)[1, 1].isnan()


def test_a_tile_is_not_scaled_by_its_neighbours():
    x = torch.ones(2, 256)
    x[0, 128:] = 1e6
    x[1] = 1e-6
    assert torch.equal(to_tiles(x, E5M6).values(torch.float32)[:, :128].log10().round(), x[:, :128].log10().round())


@FORMATS
def test_held_until_the_gradient(fmt):
    """Between its last use and the gradient a tensor takes no memory; the product sees the dequantised values."""
    x = data().requires_grad_()
    weight = torch.randn(384, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    middle = x * 1.0
    expected = quantise(middle.detach(), TILE, fmt, power_of_2=True).dequantise()
    out = middle @ weight
    hold(middle, fmt, until=out)
    assert middle.untyped_storage().nbytes() == 0
    out.sum().backward()
    assert torch.equal(middle.detach(), expected)
    torch.testing.assert_close(weight.grad, expected.t() @ torch.ones(40, 8), rtol=1e-6, atol=0)


def test_nothing_is_left_after_the_backward_pass():
    """Also while the graph's nodes live on, as those of Transformer Engine's functions do."""
    x = data().requires_grad_()
    middle = x * 1.0
    out = middle @ torch.ones(384, 8)
    hold(middle, E4M3, until=out)
    out.sum().backward(retain_graph=True)
    (hook,) = out._backward_hooks.values()
    kept = [cell.cell_contents for cell in hook.__closure__]
    assert [] in kept  # what waited
    assert not any(isinstance(one, (torch.Tensor, torch.UntypedStorage)) for one in kept)


def test_nothing_is_held_without_gradients():
    x = data()
    with torch.no_grad():
        hold(x, E4M3, until=x * 2)
    assert x.untyped_storage().nbytes() == x.nbytes


def test_a_part_of_a_storage_is_refused():
    x = data().requires_grad_()
    y = x * 1.0
    with pytest.raises(RuntimeError, match="larger storage"):
        hold(y[:4], E4M3, until=y.sum())
