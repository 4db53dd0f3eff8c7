"""Layers of the published model, as few as one GPU holds."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import NO_FP8, Recipe


def published(
    layers: int, experts: int, gpus: int = 1, sequences: int = 1, recompute: Sequence[str] = (), **precision: str
) -> Recipe:
    """`layers` MoE layers of `dsv3_671b_2048xh800` with `experts` experts over `gpus` expert-parallel GPUs, `sequences`
    of 4096 tokens a micro-batch.

    Every option of precision and recomputation is off but those named.
    """
    return load(
        "dsv3_671b_2048xh800",
        [
            f"parallel={{world_size: {gpus}, expert: {gpus}}}",
            "pipeline={schedule: 1f1b}",
            f"model.num_hidden_layers={layers}",
            "model.first_k_dense_replace=0",
            f"model.n_routed_experts={experts}",
            *([] if experts >= 64 else ["model.n_group=1", "model.topk_group=1"]),
            "model.vocab_size=8192",
            "model.num_nextn_predict_layers=0",
            "schedule.mtp_weight=0",
            "schedule.bias_update_speed=0",  # the same routing in every step
            f"training.recompute=[{', '.join(recompute)}]",
            f"training.micro_batch_size={sequences}",
            "optim.ema_decay=null",
            "data.train=[{path: unused}]",
            *NO_FP8,
            *(f"precision.{key}={value}" for key, value in precision.items()),
        ],
    )
