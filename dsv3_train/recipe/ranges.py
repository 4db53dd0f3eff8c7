"""What a number of a recipe may be, and why: beyond these bounds arithmetic overflows, or the value is a typing error.

A bound that protects arithmetic says of what. The others lie a hundred times or more beyond anything published, so
that no experiment meets them, and far below what would fill a machine's memory before a run can say so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LARGEST_EXTENT = 10**18
"""Tokens or steps: counted in 64 bits (9.2e18), and 67,000 times the report's 14.8T."""

Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of a layer: the product of two, in bytes, is counted in 64 bits. DeepSeek-V3's widest is 18,432."""
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
"""Tokens: datasets hold ids in 32 bits, losses in FP32 count to 2^24 exactly. DeepSeek-V3 has 129,280."""
Experts = Annotated[int, Field(gt=0, le=1 << 14)]
"""Per layer, or groups of them: each is a module of its own on a CPU. DeepSeek-V3 has 256, Kimi K2 384."""
Processes = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of a run, or one of its parallel dimensions. The largest published run has about 10^5."""
Positions = Annotated[int, Field(gt=0, le=1 << 24)]
"""Tokens of a sequence: FP32, which RoPE's angles are computed in, counts to 2^24 exactly."""
Sequences = Annotated[int, Field(gt=0, le=10**9)]
"""Of a batch: with 4096 tokens each that is 0.3 of the report's whole run in one step."""
Times = Annotated[int, Field(ge=0, le=10**15)]
"""Steps between two events, or a count of events. 0 has the meaning that stands at the key."""
Some = Annotated[int, Field(gt=0, le=10**15)]
"""As `Times`, where 0 has no meaning."""
Seconds = Annotated[float, Field(ge=0, le=1e7)]
"""116 days, longer than any allocation; timers of the operating system overflow far beyond."""
Seed = Annotated[int, Field(ge=-(1 << 62), le=1 << 62)]
"""64 bits, as torch takes it, and room for what is added to it."""
DataSeed = Annotated[int, Field(ge=0, le=4_000_000_000)]
"""32 bits without a sign, as NumPy takes it, and room for 10^8 epochs, each of which adds 1."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Of a whole."""
Decay = Annotated[float, Field(ge=0, le=0.999999)]
"""Per step, of a moving average in FP32: 1 - 1e-6 is the mean of a million steps, and 1 - 6e-8 rounds to 1."""
NormEpsilon = Annotated[float, Field(ge=1e-12, le=0.1)]
"""Added to a mean square in FP32. 0 divides by zero for a row of zeros, a negative one gives NaN for small rows; more
than 0.1 outweighs the activations. Published: 1e-5 and 1e-6."""
AdamEpsilon = Annotated[float, Field(ge=1e-30, le=1.0)]
"""Added to a root in FP32, whose smallest normal number is 1.2e-38: below, parameters without gradient become 0 / 0.
With more than 1 Adam's step no longer adapts."""
WeightDecay = Annotated[float, Field(ge=0, le=100)]
"""The report's is 0.1; `checks.py` also holds it against the learning rate."""
Spread = Annotated[float, Field(ge=1e-8, le=10)]
"""Standard deviation of initial weights: 0 gives every expert the same gradient, and BF16 products of more than 10
overflow within a few layers. The report's is 0.006."""
RoutedScale = Annotated[float, Field(ge=1e-3, le=1e3)]
"""What gates are multiplied by; 0 shuts all routed experts off, a negative one turns them round. Published:
1 to 2.9."""
RopeBase = Annotated[float, Field(ge=1, le=1e12)]
"""Frequencies are base^(-2i/d): below 1 they would grow, and 0 divides by zero. Published: 1e4 to 1e6."""
LossWeight = Annotated[float, Field(ge=0, le=1e3)]
"""Beside 1, the weight of the next token's loss. Published: up to 0.3."""
DataWeight = Annotated[float, Field(ge=1e-9, le=1e9)]
"""Relative to the other datasets'; Megatron-core sums them up in 64 bits."""
ClipNorm = Annotated[float, Field(ge=0, le=1e6)]
"""The report's is 1; `checks.py` refuses those between 0 and 1e-6, which would leave no gradient in FP32."""
StandardDeviations = Annotated[float, Field(gt=0, le=1e6)]
"""Published nowhere; noise reaches 5."""

SCHEDULED = {
    "lr": (100.0, "AdamW moves each weight by up to that much a step, and initial weights are about 0.006"),
    "batch_size": (1e9, "no run takes that many sequences a step"),
    "mtp_weight": (1e3, "the next token's loss has weight 1"),
    "bias_update_speed": (1.0, "the scores that it is added to lie between 0 and 1"),
}
"""The largest value of each schedule, and why."""
