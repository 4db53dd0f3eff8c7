"""What GPUs do to the operands of linear layers, done to FP32 tensors: `precision.fp8: emulated` (a CPU has no FP8).

Three products make a linear layer, y = x W^T (Fprop), dx = dy W (Dgrad) and dW = dy^T x (Wgrad). Each sums over another
dimension, along which its operands are scaled: tokens by features in tiles of 1 x 128 for the first two, of 128 x 1
for the third, a copy of its own made from the same BF16; weights in blocks of 128 x 128, one copy for both products
(report, section 3.3.2; Transformer Engine's `Float8BlockScaling`). Products are of dequantised values, in FP32: on
powers of 2 they are the same as those of codes, and the sums differ in order only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_train.precision.formats import E4M3
from dsv3_train.precision.reference import scale_of

_LENGTH = 128
"""Of a tile, and of a block's sides."""


class Exact:
    """Operands and results as they are."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Activations or their gradients [..., features], to be summed over features."""
        return x

    def tokens(self, x_tf: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The same as [tokens, features], to be summed over tokens: of each group of `counts` rows by itself."""
        return x_tf

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """[..., out, in], to be summed over either."""
        return weight

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """Results of Fprop and Dgrad; those of Wgrad are FP32 always."""
        return y


class Bf16(Exact):
    """Operands and results rounded to BF16."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    def tokens(self, x_tf: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return x_tf.bfloat16().float()

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.bfloat16().float()

    def output(self, y: torch.Tensor) -> torch.Tensor:
        return y.bfloat16().float()


@dataclass(frozen=True)
class BlockScaled(Bf16):
    """Operands of BF16 rounded to E4M3 under a scale for each tile or block, results to BF16."""

    power_of_2: bool

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().features(x), columns=_pieces(x.size(-1)))

    def tokens(self, x_tf: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return self._rounded(super().tokens(x_tf, counts), rows=[piece for n in counts for piece in _pieces(n)])

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().weight(weight), _pieces(weight.size(-2)), _pieces(weight.size(-1)))

    def _rounded(
        self, x: torch.Tensor, rows: list[int] | None = None, columns: list[int] | None = None
    ) -> torch.Tensor:
        """`reference.quantise` and back, bit by bit, without the codes.

        Args:
            x: FP32 [..., m, k].
            rows: numbers of rows that share a scale; None: each has its own.
            columns: the same of columns.
        """
        if not x.numel():  # of experts without tokens
            return x
        amax = x.abs()
        if columns:
            amax = torch.cat([piece.amax(-1, keepdim=True) for piece in amax.split(columns, -1)], -1)
        if rows:
            amax = torch.cat([piece.amax(-2, keepdim=True) for piece in amax.split(rows, -2)], -2)
        scale = scale_of(amax, E4M3, self.power_of_2)
        back = 1.0 / scale
        for dimension, lengths in ((-1, columns), (-2, rows)):
            if lengths and len(lengths) > 1:
                repeats = torch.tensor(lengths, device=x.device)
                scale, back = (s.repeat_interleave(repeats, dimension) for s in (scale, back))
        return E4M3.round(x * scale).mul_(back)


def _pieces(length: int) -> list[int]:
    """128, 128, ..., and what is left."""
    whole, rest = divmod(length, _LENGTH)
    return [_LENGTH] * whole + [rest] * (rest > 0)


EXACT = Exact()
