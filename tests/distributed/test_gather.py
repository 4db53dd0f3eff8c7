"""Optimizer states put together for a checkpoint: the same as Megatron-core's, with less memory."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from parity import in_processes, tiny


def compare(recipe: Recipe, out: Path, device: str = "cpu") -> None:
    """On each rank; leaves in OUT/RANK.json what was found."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from dsv3_train.optim import gather
    from dsv3_train.training.assemble import assemble

    gather._STRETCH = 1000
    distributed.start(recipe, device)
    trainer = assemble(recipe, device)
    for chunk in trainer.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            generator = torch.Generator().manual_seed(torch.distributed.get_rank())
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=generator))
    trainer.optimizer.step()
    zeros, created = torch.zeros, []

    def counted(*shape, **options):
        made = zeros(*shape, **options)
        created.append(made.numel())
        return made

    rank, checked, split, whole = torch.distributed.get_rank(), 0, 0, 0
    for one in trainer.optimizer.chained_optimizers:
        ours = one.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        torch.zeros = counted
        theirs = DistributedOptimizer.get_parameter_state_dp_zero(one, use_gloo_comm=False, return_on_all_ranks=True)
        torch.zeros = zeros
        assert ours.keys() == theirs.keys()
        wanted = []
        for number, buffer in enumerate(one.buffers):
            ((outline, expected),) = zip(ours[number].values(), theirs[number].values(), strict=True)
            assert outline.keys() == expected.keys()
            assert outline["numel_unpadded"] == expected["numel_unpadded"]
            for name in ("param", "exp_avg", "exp_avg_sq"):
                whole += expected[name].numel()
                for index, (param, (start, end, _)) in enumerate(buffer.param_index_map.items()):
                    view, values = (x[name][start:end].view(param.shape) for x in (outline, expected))
                    if index % 4 == rank:  # others write it
                        continue
                    if param.dim() > 1:  # as gate and up of [experts, gate and up, hidden]
                        view, values = (x.chunk(2, dim=1)[1] for x in (view, values))
                        split += not view.is_contiguous()
                    wanted.append((ShardedTensor.from_rank_offsets(name, view), values))
        if not checked:
            alien = ShardedTensor.from_rank_offsets("alien", torch.empty(3, device="meta"))
            with pytest.raises(RuntimeError, match="alien"):
                gather.fill(trainer.optimizer, [alien])
        gather.fill(trainer.optimizer, [x for x, _ in wanted])
        for x, values in wanted:
            assert torch.equal(x.data, values)
            assert x.data.is_contiguous()
            assert x.data.untyped_storage().nbytes() == 4 * x.data.numel()  # its own memory, and no more
            checked += bool(values.any())
    (out / f"{rank}.json").write_text(json.dumps([checked, split, sum(created), whole]))
    distributed.stop()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [{"world_size": 1}, {"world_size": 4, "expert": 2}], ids=["one", "dp4_ep2"])
def test_states_are_megatrons(run, tmp_path, layout, moments):
    precision = {"params": "bf16", "adam_moments": moments}
    recipe = tiny(parallel={"zero1": True, **layout}, precision=precision)
    in_processes(functools.partial(compare, recipe, tmp_path), layout["world_size"])
    check(tmp_path, layout["world_size"])


def check(out: Path, ranks: int) -> None:
    for rank in range(ranks):
        checked, split, created, whole = json.loads((out / f"{rank}.json").read_text())
        assert checked > 100
        assert split > 20
        # Megatron-core no longer makes more than what there is, on every rank? Then optim/gather.py is not needed.
        assert created > 1.5 * whole
