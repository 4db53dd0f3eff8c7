"""The losses of a step, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from dsv3_train.recipe.schema import Model
from dsv3_train.runtime import megatron_versions


@dataclass(frozen=True)
class Losses:
    """Means over the tokens of a global batch, in nats, before any weight."""

    loss: float
    mtp: float | None
    balance: float | None
    """Sequence-wise balance loss over alpha, mean over MoE layers: 1 when every expert gets its share. None where alpha
    is 0: Megatron tracks nothing then.
    """


def reduce_losses(reported: list[dict[str, torch.Tensor]], micro_batches: int, model: Model) -> Losses:
    """Collect what Megatron tracked over the micro-batches of a step. Collective.

    Main and MTP loss arise on the last stage, balance losses on every stage; all are averaged over
    data-parallel ranks.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(5, device=device, dtype=torch.float64)  # loss, tokens, MTP loss, balance loss, tracked
    for report in reported:
        sums[:2] += report["loss"].double()
    mtp, balance = megatron_versions.tracked_mtp_loss(), get_moe_layer_wise_logging_tracker()
    if mtp is not None:
        sums[2] = mtp.double().mean() / micro_batches
        mtp.zero_()
    if "seq_load_balancing_loss" in balance:
        values = balance["seq_load_balancing_loss"]["values"]
        layers = model.num_hidden_layers - model.first_k_dense_replace + model.num_nextn_predict_layers
        # Every tensor-parallel rank tracks its own share of the sequence.
        share = parallel_state.get_tensor_model_parallel_group()
        sums[3] = values.double().sum() / (micro_batches * layers)
        sums[4] = 1  # a stage without MoE layers does not know
        values.zero_()
        torch.distributed.all_reduce(sums[3:], group=share)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    loss, tokens, mtp_loss, balance_loss, tracked = sums.tolist()
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return Losses(
        loss=loss / tokens,
        mtp=mtp_loss / replicas if model.num_nextn_predict_layers else None,
        balance=balance_loss / replicas if tracked else None,
    )
