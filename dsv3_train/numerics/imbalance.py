"""Why gradients are scaled in 1 x 128 tiles: errors of a linear layer's input gradient where tokens differ in size.

Gradients of activations are highly imbalanced among tokens, and a scale that many tokens share loses the small ones;
the report saw a model diverge with 128 x 128 blocks in exactly this product (report, appendix B.2).

Measured: dX = dY W, with dY [tokens, outputs] and W [outputs, inputs] in BF16, dY ~ N(0, 1) with token i multiplied by
10^-u_i, u_i uniform in [0, decades], W ~ N(0, 0.006), W quantised in 128 x 128 blocks of E4M3 and dY by what is under
test. The error of a token is |dX' - dX| / |dX| (2-norms over its row), dX' being the FP64 product of the dequantised
operands and dX that of the BF16 ones. So sums are exact, and only the quantisation is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from dsv3_train.precision.formats import E4M3, E5M2, E5M6, Format
from dsv3_train.precision.reference import BLOCK, COLUMN_TILE, TILE, quantise

DECADES = (0, 1, 2, 3, 4, 5, 6)
TOKENS, OUTPUTS, INPUTS = 512, 512, 256
LOST = 0.5
"""A token whose gradient is off by more than half of itself is as good as lost."""
Dequantised = Callable[[torch.Tensor], torch.Tensor]
"""BF16 [tokens, outputs] -> what is left of it once quantised and dequantised, any floating type, same shape."""


@dataclass(frozen=True)
class Errors:
    """Of one way to quantise, at one spread."""

    decades: int
    """Powers of ten between the largest and the smallest token; 0: normal data."""
    operand: float
    """|dY' - dY| / |dY| over the whole matrix: blind to small tokens."""
    median: float
    """Of the tokens' errors in dX."""
    p95: float
    """Their 95th percentile."""
    lost: float
    """Share of tokens whose error is more than `LOST`."""


def imbalanced(decades: float, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """dY [tokens, outputs] and W [outputs, inputs] of the study, BF16; the same bits on every device."""
    generator = torch.Generator().manual_seed(seed)
    gradient_to = torch.randn(TOKENS, OUTPUTS, generator=generator)
    gradient_to *= 10 ** (-decades * torch.rand(TOKENS, 1, generator=generator))
    weight_oi = torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.006
    return gradient_to.bfloat16().to(device), weight_oi.bfloat16().to(device)


def study(
    gradient: Dequantised,
    weight: Dequantised | None = None,
    *,
    decades: Sequence[int] = DECADES,
    device: str = "cpu",
) -> list[Errors]:
    """Errors of the input gradient, one per spread.

    Args:
        gradient: quantises and dequantises dY.
        weight: the same of W; None: the reference's 128 x 128 blocks of E4M3 with power-of-2 scales.
    """
    weight = weight or reference(BLOCK, E4M3)
    found = []
    for spread in decades:
        gradient_to, weight_oi = imbalanced(spread, device=device)
        left_to, left_oi = gradient(gradient_to).double(), weight(weight_oi).double()
        exact_to, exact_oi = gradient_to.double(), weight_oi.double()
        exact_ti = exact_to @ exact_oi
        error_t = (left_to @ left_oi - exact_ti).norm(dim=1) / exact_ti.norm(dim=1)
        found.append(
            Errors(
                decades=spread,
                operand=float((left_to - exact_to).norm() / exact_to.norm()),
                median=float(error_t.median()),
                p95=float(error_t.quantile(0.95)),
                lost=float((error_t > LOST).double().mean()),
            )
        )
    return found


def reference(tile: tuple[int, int] | None, fmt: Format, power_of_2: bool = True) -> Dequantised:
    """Quantise and dequantise as `precision/reference.py` does; `tile` None: one scale for the tensor."""
    return lambda x_mk: quantise(x_mk, tile, fmt, power_of_2).dequantise()


TILES = {"1x128": TILE, "128x1": COLUMN_TILE, "128x128": BLOCK, "tensor": None}
FORMATS = {"E4M3": (E4M3, True), "E4M3 FP32": (E4M3, False), "E5M2": (E5M2, True), "E5M6": (E5M6, True)}
"""Format, and whether its scales are powers of 2 (else FP32)."""


def table() -> dict:
    """The study of every tile shape and format of the reference, as plain values."""
    return {
        "format": 1,
        "product": "dX = dY W, W in 128x128 E4M3",
        "shape": {"tokens": TOKENS, "outputs": OUTPUTS, "inputs": INPUTS},
        "lost_above": LOST,
        "rows": [
            {
                "tile": tile_name,
                "format": format_name,
                "errors": [asdict(errors) for errors in study(reference(tile, fmt, power_of_2))],
            }
            for format_name, (fmt, power_of_2) in FORMATS.items()
            for tile_name, tile in TILES.items()
        ],
    }
