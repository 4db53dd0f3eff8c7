"""One optimizer step: micro-batches through Megatron's schedule, gradients, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_train.model.stage import Place, Stage
from dsv3_train.optim.build import set_learning_rate
from dsv3_train.optim.schedules import Values
from dsv3_train.pipeline.executor import Executor
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat
from dsv3_train.runtime.pipeline_groups import replicas
from dsv3_train.training.cuda_graph import MicroBatchGraph
from dsv3_train.training.experts import ExpertLoad
from dsv3_train.training.losses import Losses, reduce_losses

Batch = dict[str, torch.Tensor]


@dataclass
class Trainer:
    """The parts of one rank that a step works on."""

    recipe: Recipe
    config: MLATransformerConfig
    models: list[Stage]
    """The stages themselves."""
    chunks: list[DistributedDataParallel]
    """The same, wrapped for data parallelism."""
    optimizer: MegatronOptimizer
    load: ExpertLoad
    executor: Executor | None
    """Runs the schedule; None: Megatron-core does, or the graph."""
    graph: MicroBatchGraph | None = None
    """Replays micro-batches, where nothing in them has to wait for the host."""


def connect(trainer: Trainer) -> None:
    """Hand Megatron's schedule what it calls: loss scaling, gradient reduction, synchronisation."""
    config, chunks, parallel = trainer.config, trainer.chunks, trainer.recipe.parallel
    config.grad_scale_func = trainer.optimizer.scale_loss
    config.finalize_model_grads_func = partial(_finalize, trainer.load)

    def per_chunk(name: str):
        functions = [getattr(chunk, name) for chunk in chunks]
        return functions if len(functions) > 1 else functions[0]

    if parallel.overlap_grad_reduce:
        config.no_sync_func = per_chunk("no_sync")
        if len(chunks) > 1:
            config.grad_sync_func = per_chunk("start_grad_sync")
    if parallel.overlap_param_gather:
        config.param_sync_func = per_chunk("start_param_sync")


def _finalize(load: ExpertLoad, chunks: list, num_tokens: torch.Tensor | None = None, **options) -> None:
    load.capture()  # Megatron clears the counts once the routing biases are updated
    copies = replicas()
    if copies:  # the other copy of a stage saw the other half of the tokens, and its biases must stay the same
        load.add_up(copies.pair)
    finalize_model_grads(chunks, num_tokens, **options)


def needs_data(trainer: Trainer) -> bool:
    """Whether a stage of this rank sees tokens: embedding, MTP or the loss."""
    return any(model.pre_process or model.post_process or model.mtp_process for model in trainer.models)


def _loss(loss_mask_bs: torch.Tensor | None, loss_bs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Sum over tokens and their number (Megatron divides and averages over micro-batches), and both to report."""
    assert loss_mask_bs is not None  # Megatron asks the last stage alone, which sees data
    loss_sum = (loss_bs.float() * loss_mask_bs).sum()
    tokens = loss_mask_bs.sum().int()
    # A copy of the sum: Megatron divides it in place.
    return loss_sum.clone(), tokens, {"loss": torch.stack([loss_sum.detach(), tokens.float()])}


def _forward(batches: Iterator[Batch] | None, model: Any, return_schedule_plan: bool = False):
    heartbeat.mark("forward of a micro-batch")
    run = model.build_schedule_plan if return_schedule_plan else model
    if batches is None:
        return run(None, None, None), partial(_loss, None)
    batch = next(batches)
    output = run(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(_loss, batch["loss_mask"])


def _run(trainer: Trainer, batches: list[Batch] | None, count: int, forward_only: bool) -> list[Batch]:
    """All micro-batches of a step through every stage; what the last stage reports, per micro-batch."""
    training, chunks = trainer.recipe.training, trainer.chunks
    iterators = [_of_direction(trainer, model.place, batches) for model in trainer.models]
    several = len(chunks) > 1 or trainer.executor is not None
    run: Callable[..., list[Batch]] = trainer.executor or trainer.graph or get_forward_backward_func()
    return run(
        forward_step_func=_forward,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=count,
        seq_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        decoder_seq_length=training.sequence_length,
        forward_only=forward_only,
    )


def _of_direction(trainer: Trainer, place: Place, batches: list[Batch] | None) -> Iterator[Batch] | None:
    """The micro-batches that go through a chunk: of dualpipe half enter at the first rank, the others at the last."""
    if batches is None:
        return None
    if trainer.recipe.pipeline.schedule != "dualpipe":
        return iter(batches)
    half = (len(batches) + 1) // 2
    return iter(batches[half:] if place.direction else batches[:half])


def forward_backward(trainer: Trainer, values: Values, batches: list[Batch] | None, count: int) -> Losses:
    """Gradients of one global batch, reduced; routing biases updated once.

    Args:
        batches: this rank's micro-batches of [b, s] tensors, or None where no stage needs them.
        count: their number.
    """
    trainer.config.mtp_loss_scaling_factor = values.mtp_weight
    trainer.config.moe_router_bias_update_rate = values.bias_update_speed
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reported = _run(trainer, batches, count, forward_only=False)
    return reduce_losses(reported, count, trainer.recipe.model)


def update(trainer: Trainer, values: Values) -> float:
    """Clip and apply the gradients; returns their norm before clipping."""
    set_learning_rate(trainer.optimizer, values.lr, trainer.recipe.optim.weight_decay)
    _, grad_norm, _ = trainer.optimizer.step()
    return float(grad_norm)


def gather_parameters(trainer: Trainer) -> None:
    """Make every rank's parameters current where their all-gather was left to the next forward pass. Collective."""
    if trainer.recipe.parallel.overlap_param_gather:
        for chunk in trainer.chunks:
            chunk.start_param_sync(force_sync=True)


@torch.no_grad()
def evaluate(trainer: Trainer, batches: list[Batch] | None, count: int) -> float:
    """Mean loss per token (nats) over micro-batches, the same on every rank."""
    for chunk in trainer.chunks:
        chunk.eval()
    reported = _run(trainer, batches, count, forward_only=True)
    for chunk in trainer.chunks:
        chunk.train()
    return reduce_losses(reported, count, trainer.recipe.model).loss


def micro_batches_per_step(recipe: Recipe, batch_size: int) -> int:
    """Micro-batches that each data-parallel rank takes of a global batch (sequences)."""
    return batch_size // (recipe.training.micro_batch_size * parallel_state.get_data_parallel_world_size())
