"""Runs of a tiny DeepSeek-V3 in any layout, on the same weights and data, to be compared with one process."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import _free_port, _rank_environment, launch

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.05,
    },
    "parallel": {"zero1": False},
    "precision": {"params": "fp32", "adam_moments": "fp32"},
    # Adam divides by the root of a mean square: where a gradient is rounding noise, so is the update. A large
    # epsilon keeps such noise out of a comparison to 1e-5; the gradients themselves are compared too.
    "optim": {"eps": 1e-3},
    "schedule": {"lr": 5e-3, "batch_size": 8, "mtp_weight": 0.3, "bias_update_speed": 1e-3, "balance_loss": 1e-3},
    "training": {"duration": "6 steps", "sequence_length": 32},
    "runtime": {"device": "cpu"},
}


def tiny(**changes: Any) -> Recipe:
    """The tiny recipe with `section={key: value}` changes."""
    raw = copy.deepcopy(TINY)
    for section, values in changes.items():
        raw.setdefault(section, {}).update(values)
    return Recipe.model_validate(raw)


def sample(recipe: Recipe, step: int, index: int) -> torch.Tensor:
    """Sequence `index` of global batch `step`, [1, s + 1], the same in any layout: a noisy arithmetic sequence."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    length = recipe.training.sequence_length + 1
    start = torch.randint(0, recipe.model.vocab_size, (1, 1), generator=generator)
    noise = torch.randint(0, 2, (1, length), generator=generator)
    return (start + noise + 7 * (1 + index % 2) * torch.arange(length)) % recipe.model.vocab_size


def batch(recipe: Recipe, step: int, index: int, lengths: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Micro-batch `index` of global batch `step`."""
    size = recipe.training.micro_batch_size
    tokens = torch.cat([sample(recipe, step, index * size + i) for i in range(size)])
    if lengths:
        tokens = tokens[:, : lengths[index % len(lengths)] + 1]
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(tokens.size(1) - 1).expand(size, -1),
        "loss_mask": torch.ones(size, tokens.size(1) - 1),
    }


@contextlib.contextmanager
def assembled(recipe: Recipe) -> Iterator[Any]:
    """The parts of a run of one process, in this process."""
    distributed.prepare_import("cpu")
    from dsv3_train.training.assemble import assemble

    os.environ.update(_rank_environment(0, 1, _free_port()))
    distributed.start(recipe, "cpu")
    try:
        yield assemble(recipe, "cpu")
    finally:
        leave_no_trace()


def leave_no_trace() -> None:
    """Stop being a rank in this process, so that another test can be one, with another model."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()  # it has this model's number of layers
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of another shape than another test's
    distributed.stop()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def in_processes(work: Callable[[], None], world_size: int) -> None:
    """Run `work` in forked processes, also where one would do: Megatron's state is global."""
    if world_size > 1:
        launch(work, world_size, "cpu")
        return
    process = multiprocessing.get_context("fork").Process(target=launch, args=(work, 1, "cpu"))
    process.start()
    process.join()
    assert process.exitcode == 0


def train(
    recipe: Recipe,
    out: Path,
    steps: int = 6,
    device: str = "cpu",
    lengths: tuple[int, ...] = (),
    settings: dict[str, Any] | None = None,
) -> None:
    """Train on this rank; leaves losses, grad norms, step 1's gradients and the final weights in `out/RANK.pt`.

    Args:
        lengths: of the sequences, in turn; else all are as long as the recipe says.
        settings: Megatron-core's that no recipe has.
    """
    from megatron.core import parallel_state

    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.step import (
        evaluate,
        forward_backward,
        gather_parameters,
        micro_batches_per_step,
        needs_data,
        update,
    )

    distributed.start(recipe, device)
    if settings:
        from dsv3_train.training import assemble as module

        plain = module.megatron_config
        module.megatron_config = lambda *args: _with(plain(*args), settings)
    trainer = assemble(recipe, device)
    schedules = Schedules(recipe)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    result: dict[str, Any] = {"losses": [], "norms": []}
    consumed = 0

    def draw(step: int, count: int) -> list[dict[str, torch.Tensor]] | None:
        if not needs_data(trainer):
            return None
        drawn = [batch(recipe, step, m * size + rank, lengths) for m in range(count)]
        return [{name: x.to(device) for name, x in micro_batch.items()} for micro_batch in drawn]

    for step in range(steps):
        values = schedules.at(consumed)
        count = micro_batches_per_step(recipe, values.batch_size)
        losses = forward_backward(trainer, values, draw(step, count), count)
        result["losses"].append((losses.loss, losses.mtp, losses.balance))
        if step == 0:
            unshard_gradients(trainer)
            result["gradients"] = list(pieces(trainer, lambda parameter: _kept(parameter.main_grad)))
        result["norms"].append(update(trainer, values))
        consumed += values.batch_size
    gather_parameters(trainer)
    counts, biases = trainer.load.gather()
    result["expert_counts"], result["expert_biases"] = counts, biases
    result["paired"] = trainer.executor.paired if trainer.executor else 0
    result["evaluation"] = evaluate(trainer, draw(steps, count), count)
    result["weights"] = list(pieces(trainer, _kept))
    torch.save(result, out / f"{torch.distributed.get_rank()}.pt")
    distributed.stop()


def _with(config: Any, settings: dict[str, Any]) -> Any:
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def assert_same(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Losses, norms, gradients, weights, counts and biases of two runs."""
    for what in ("losses", "norms", "evaluation"):
        torch.testing.assert_close(got[what], expected[what], rtol=tolerance, atol=0)
    for what in ("gradients", "weights"):
        assert got[what].keys() == expected[what].keys()
        for name, tensor in got[what].items():
            error = (tensor - expected[what][name]).norm() / expected[what][name].norm()
            assert error < tolerance, (what, name, float(error))
    assert torch.equal(got["expert_counts"], expected["expert_counts"])
    torch.testing.assert_close(got["expert_biases"], expected["expert_biases"], rtol=0, atol=1e-9)


def unshard_gradients(trainer: Any) -> None:
    """Under ZeRO-1 a rank holds the reduced gradient of its shard only: collect the others'."""
    for chunk in trainer.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.numel() // ranks.size()
                mine = bucket.grad_data[ranks.rank() * shard : (ranks.rank() + 1) * shard].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()


def pieces(trainer: Any, of: Any) -> Iterator[tuple[str, tuple, tuple, torch.Tensor]]:
    """(global name, global shape, global slice, values) of every piece of every parameter of this rank.

    Args:
        of: the values for a parameter.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from dsv3_train.model.init import sharding_metadata

    for model in trainer.models:
        for entry in nested_values(model.sharded_state_dict(metadata=sharding_metadata())):
            if not isinstance(getattr(entry, "data", None), torch.nn.Parameter):
                continue
            entry.data = of(entry.data)
            entry.dtype = torch.float32
            for piece in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                yield piece.key, piece.global_shape, piece.global_slice(), piece.data


def whole(out: Path, world_size: int, what: str) -> dict[str, torch.Tensor]:
    """Global tensors put together of all ranks' pieces; what two ranks hold must be the same, bit by bit."""
    tensors: dict[str, torch.Tensor] = {}
    for rank in range(world_size):
        for key, shape, place, values in torch.load(out / f"{rank}.pt", weights_only=False)[what]:
            tensor = tensors.setdefault(key, torch.full(shape, float("nan")))
            before = tensor[place]
            known = ~before.isnan()
            assert torch.equal(before[known], values.reshape(before.shape)[known]), f"{key} on rank {rank}"
            tensor[place] = values.reshape(before.shape)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors
