"""Reference FP8 against torch's own types, against exact arithmetic, and against the report's findings."""

from __future__ import annotations

import pytest
import torch

from dsv3_train.precision.formats import E4M3, E5M2, E5M6
from dsv3_train.precision.reference import BLOCK, COLUMN_TILE, TILE, block_gemm, quantise, scale_of


def inputs() -> torch.Tensor:
    """FP32 over all magnitudes, with zeros, ties and values beyond every format."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=generator) * 10 ** torch.empty(20_000).uniform_(-9, 6, generator=generator)
    ties = torch.arange(-2048, 2048) / 16
    return torch.cat([spread, ties, ties * 2.0**-10, torch.tensor([0.0, -0.0, 1e30, -1e30, 464.0, 480.0])])


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_rounding_equals_torch(fmt):
    x = inputs()
    expected = x.clamp(-fmt.largest, fmt.largest).to(fmt.dtype).float()
    assert torch.equal(fmt.round(x), expected)
    assert torch.equal(fmt.decode(fmt.encode(x)), expected)


def test_e5m6_is_fp16_with_a_shorter_mantissa():
    codes = torch.arange(-(2**11), 2**11, dtype=torch.int16)
    values = E5M6.decode(codes)
    finite = values.isfinite()
    assert torch.equal(E5M6.encode(values[finite]), codes[finite])  # every finite code is a fixed point
    x = inputs()
    ordered = values[finite].unique()
    place = torch.searchsorted(ordered, x.clamp(-E5M6.largest, E5M6.largest)).clamp(1, len(ordered) - 1)
    nearest = torch.minimum((x - ordered[place]).abs(), (x - ordered[place - 1]).abs())
    within = x.abs() <= E5M6.largest
    assert torch.equal((E5M6.round(x) - x).abs()[within], nearest[within])
    assert torch.equal(E5M6.round(x).abs()[~within], torch.full_like(x[~within], E5M6.largest))


def test_scales():
    amax = torch.tensor([0.0, 448.0, 1.0, 3.0, 1e-40, float("inf"), float("nan"), 447.9])
    exact = scale_of(amax, E4M3, power_of_2=False)
    assert exact.tolist()[:3] == [1.0, 1.0, 448.0]
    assert exact[3] == torch.tensor(448.0) / 3
    assert exact[4] == torch.finfo(torch.bfloat16).max
    assert exact.tolist()[5:7] == [1.0, 1.0]
    powers = scale_of(amax, E4M3, power_of_2=True)
    assert powers.tolist()[:4] == [1.0, 1.0, 256.0, 128.0]
    assert torch.equal(torch.frexp(powers).mantissa, torch.full_like(powers, 0.5))
    assert (powers <= exact).all()


CASES = {
    "normal": lambda x: x,
    "outliers": lambda x: x * torch.where(torch.arange(x.size(1)) % 97 == 0, 1000.0, 1.0),
    "zero tiles": lambda x: x * (torch.arange(x.size(0))[:, None] % 3 > 0),
    "decades": lambda x: x * 10 ** torch.linspace(-6, 0, x.size(0))[:, None],
    "tiny": lambda x: x * 1e-30,
}


@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("tile", [TILE, COLUMN_TILE, BLOCK, None], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_quantised_values_lie_within_a_step(case, tile, power_of_2):
    """3 bits of mantissa: at most 1/16 of a value off, or half a step of the tile's subnormals."""
    torch.manual_seed(0)
    x = CASES[case](torch.randn(300, 260)).bfloat16()
    packed = quantise(x, tile, power_of_2=power_of_2)
    error = (packed.dequantise() - x.float()).abs()
    # A scale that is no power of 2 adds the rounding of two products.
    bound = torch.maximum(x.float().abs() / 16, 2.0**-10 * packed.scales()) * (1 + 1e-6)
    assert (error <= bound).all()
    again = quantise(packed.dequantise(), tile, power_of_2=power_of_2)
    if power_of_2:  # exact scaling: what is representable stays as it is
        assert torch.equal(again.dequantise(), packed.dequantise())


def test_gemm_equals_exact_products():
    """In FP64 there is no rounding to speak of: what is left is FP32 summation."""
    torch.manual_seed(0)
    a, b = quantise(torch.randn(70, 640)), quantise(torch.randn(200, 640) * 0.006, BLOCK)
    exact = a.dequantise().double() @ b.dequantise().double().t()
    magnitude = a.dequantise().abs().double() @ b.dequantise().abs().double().t()
    assert ((block_gemm(a, b) - exact).abs() <= 640 * 2.0**-24 * magnitude).all()


def test_short_accumulators_need_promotion():
    """Report, section 3.3.2: about 14 bits and K = 4096 give up to 2% error; FP32 sums every 128 products mend it."""
    torch.manual_seed(0)
    a, b = quantise(torch.randn(64, 4096), None), quantise(torch.randn(64, 4096), None)
    exact = block_gemm(a, b)

    def error(**options) -> float:
        return float((block_gemm(a, b, accumulator_bits=14, **options) - exact).norm() / exact.norm())

    alone, promoted = error(promote_every=None), error()
    assert alone > 1e-3
    assert promoted < alone / 5


def spread_error(decades: float, tile: tuple[int, int] | None) -> float:
    """95th percentile over tokens of an input gradient's relative error, gradients spread over `decades` by token."""
    torch.manual_seed(0)
    gradient = torch.randn(256, 512) * 10 ** (-decades * torch.rand(256, 1))
    weight = torch.randn(256, 512) * 0.006
    exact = gradient.double() @ weight.double().t()
    out = quantise(gradient.bfloat16(), tile).dequantise().double() @ weight.double().t()
    return float(((out - exact).norm(dim=1) / exact.norm(dim=1)).quantile(0.95))


def test_token_imbalance_separates_the_scalings():
    """Report, appendix B.2: a 16B model diverged with gradients in 128 x 128 blocks, as they differ between tokens."""
    tiles, blocks, whole = (spread_error(6, tile) for tile in (TILE, BLOCK, None))
    assert tiles < 0.05
    assert blocks > 0.5
    assert whole > 0.5
    assert spread_error(1, BLOCK) < 0.05  # little imbalance: nobody would notice


def test_scales_that_change_between_promotions_are_refused():
    a, b = quantise(torch.randn(4, 256)), quantise(torch.randn(4, 256), BLOCK)
    with pytest.raises(ValueError, match="change within 256 products"):
        block_gemm(a, b, promote_every=None)
