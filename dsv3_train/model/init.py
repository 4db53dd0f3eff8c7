"""Initial weights that do not depend on how the model is laid out over processes."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

SHARDING = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How Megatron names and cuts tensors for checkpoints: one key per layer, free of the layout."""


def sharding_metadata() -> dict:
    """`SHARDING` with this run's process group, as Megatron's `sharded_state_dict` wants it."""
    from megatron.core import parallel_state

    return {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


@torch.no_grad()
def initialize(chunk: GPTModel, seed: int, std: float, drawn_on: str = "cpu") -> None:
    """N(0, `std`) for every weight matrix (report, section 4.2: 0.006), ones for norms, zeros for routing biases.

    A weight's values follow from `seed`, its global name and, for an expert, its index: any layout starts
    from the same model. A tensor split by tensor parallelism is drawn whole and cut.

    Args:
        drawn_on: the device that draws. A CPU's values are the same everywhere; a GPU's are others, of the same
            distribution, and there in a moment: for what is measured and thrown away.
    """

    def normal(shape: tuple[int, ...], name: str) -> torch.Tensor:
        generator = torch.Generator(drawn_on).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.randn(shape, generator=generator, device=drawn_on).mul_(std)

    filled = set()
    for entry in nested_values(chunk.sharded_state_dict(metadata=sharding_metadata())):
        if isinstance(entry, ShardedTensorFactory):  # SwiGLU's gate and up: one parameter, two pieces
            _fill(entry.data, entry.merge_fn([_values(piece, normal) for piece in entry.build()]))
        elif isinstance(entry, ShardedTensor):
            _fill(entry.data, _values(entry, normal))
        else:
            continue
        filled.add(entry.data.data_ptr())
    missing = [name for name, parameter in chunk.named_parameters() if parameter.data_ptr() not in filled]
    if missing:
        raise RuntimeError(f"no initial value for {missing}")


def _fill(weight: torch.Tensor, values: torch.Tensor) -> None:
    weight.copy_(values)
    exact = getattr(weight, "_high_precision_init_val", None)
    if exact is not None:  # an FP8 weight: what its FP32 master begins with
        exact.copy_(values)


def _values(piece: ShardedTensor, normal: Callable[[tuple[int, ...], str], torch.Tensor]) -> torch.Tensor:
    if "norm" in piece.key:
        return torch.ones(piece.local_shape)
    if piece.key.endswith("expert_bias"):
        return torch.zeros(piece.local_shape)
    if ".mlp.experts." not in piece.key:
        whole = normal(piece.global_shape, piece.key)
        return whole[piece.global_slice()].reshape(piece.local_shape)
    # [experts, out, in]: one draw for each expert of this piece.
    first, cut = piece.global_offset[0], tuple(piece.global_slice())[1:]
    count = piece.local_shape[0] if piece.prepend_axis_num == 0 else 1
    drawn = [normal(piece.global_shape[1:], f"{piece.key}:{first + i}")[cut] for i in range(count)]
    return torch.stack(drawn).reshape(piece.local_shape)
