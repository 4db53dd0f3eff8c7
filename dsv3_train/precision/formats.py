"""Small floating-point formats: which values they have, and how they are coded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """Sign, exponent and mantissa; rounding is to nearest even, and what is too large becomes the largest value."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: torch.dtype | None
    """torch's own type of these codes; None: 12-bit codes in an int16."""

    @property
    def _smallest_exponent(self) -> int:
        """Of normal values; subnormal ones have its spacing."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest values of this format, FP32. NaN stays NaN.

        Args:
            x: FP32 (or BF16, which FP32 holds exactly), any shape.
        """
        x = x.float().clamp(-self.largest, self.largest)
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # |x| = m 2^e with 1 <= m < 2: 2^e
        # Beside a number so much larger, FP32 keeps of x what this format does; and rounds as it does, to nearest even.
        larger = power.clamp_(min=2.0**self._smallest_exponent).mul_(1.5 * 2.0 ** (23 - self.mantissa_bits))
        return (x + larger).sub_(larger).copysign_(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest values: torch's 8-bit type, or for E5M6 the upper 12 bits of an FP16 in an int16."""
        values = self.round(x)
        if self.dtype is not None:
            return values.to(self.dtype)
        return values.to(torch.float16).view(torch.int16) >> 4

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, FP32."""
        if self.dtype is not None:
            return codes.float()
        return (codes << 4).view(torch.float16).float()


E4M3 = Format("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
"""The report's only 8-bit format (section 3.3.2)."""
E5M2 = Format("e5m2", 5, 2, 57344.0, torch.float8_e5m2)
E5M6 = Format("e5m6", 5, 6, 65024.0, None)
"""For the cached input of the linear layer after attention (report, section 3.3.3)."""
