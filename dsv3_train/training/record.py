"""What is known of one training step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """A line of metrics.jsonl. Losses are nats per token; times are seconds."""

    step: int
    total_steps: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    mtp_loss: float | None
    balance_loss: float | None
    """None where the schedule gives it no weight."""
    lr: float
    batch_size: int
    mtp_weight: float
    bias_update_speed: float
    grad_norm: float
    step_seconds: float
    breakdown: dict[str, float]
    tokens_per_second: float
    load_max_over_mean: list[float]
    """Per MoE layer: tokens of the busiest expert over the mean."""
    bias_spread: list[float]
    """Per MoE layer: largest routing bias minus smallest."""
    tflops_per_gpu: float | None = None
    """Model FLOPs (planner/flops.py, causal, MTP included) over time and GPUs; None on a CPU."""
    mfu: float | None = None
    """`tflops_per_gpu` over the GPU's dense BF16 peak; None on a CPU or an unknown GPU."""
    memory_gib: float | None = None
    """Peak of allocated GPU memory on rank 0, or resident memory of its process."""
