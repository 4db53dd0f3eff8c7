"""Process groups and random seeds of one rank, and the device it computes on."""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from typing import Any

import torch

from dsv3_train.errors import UserError
from dsv3_train.recipe.chunks import MIRRORED, SCHEDULED
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime.gpu_environment import gpu_environment, refuse_other_scales
from dsv3_train.runtime.rendezvous import Presence, meet

_TIMEOUT = datetime.timedelta(minutes=30)


def device_of(recipe: Recipe) -> str:
    """`cpu` or `cuda`, as the recipe says or as this machine has.

    Raises:
        UserError: the recipe wants a GPU and there is none.
    """
    available = torch.cuda.is_available()
    if recipe.runtime.device == "cuda" and not available:
        raise UserError("runtime.device: cuda, but this machine has no GPU that torch can use; set runtime.device=cpu")
    if recipe.runtime.device == "auto":
        return "cuda" if available else "cpu"
    return recipe.runtime.device


def prepare_import(device: str, recipe: Recipe | None = None) -> None:
    """What has to happen before Megatron-core is imported: patches on a CPU, environment and TE on a GPU.

    Args:
        recipe: the run's; None where nothing trains.

    Raises:
        UserError: Transformer Engine is missing on a GPU machine, or there is a GPU in a CPU run, or the environment
            asks for another FP8 than the recipe.
    """
    # Notes to developers, in every process; faults raise. (torch's compiler of extensions misses CUDA on a CPU.)
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"megatron\.core", r"transformer_engine", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    if device == "cpu":
        from dsv3_train.runtime import cpu

        cpu.install()
        return
    if recipe is not None:
        refuse_other_scales(recipe)
    for name, value in gpu_environment(recipe).items():
        os.environ.setdefault(name, value)
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Transformer Engine is missing ({error}): training on a GPU needs it; "
            "pip install --no-build-isolation 'dsv3-train[gpu]'"
        ) from None


def start(recipe: Recipe, device: str, store: torch.distributed.Store | None = None) -> None:
    """Join the process group and divide it as `recipe.parallel` says.

    The order of ranks is Megatron's: tensor, context, expert, data, pipeline (fastest first).

    Args:
        store: where the ranks have met (runtime/rendezvous.py); None: they meet now.

    Raises:
        Absent: they do not.
    """
    rank = int(os.environ["RANK"])
    if store is None:
        store, _, _ = meet(Presence(rank), recipe.faults.join_seconds, recipe.parallel.gpus_per_node)
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    if device == "cpu":
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", timeout=_TIMEOUT, **options)
    else:
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        torch.distributed.init_process_group("nccl", timeout=_TIMEOUT, device_id=gpu, **options)
    _divide(recipe)
    if recipe.pipeline.schedule in SCHEDULED:
        from dsv3_train.runtime import pipeline_groups

        pipeline_groups.create(recipe)


def pretend(recipe: Recipe, rank: int) -> None:
    """Be `rank` of the recipe's world in one process: torch's `fake` groups have sizes, but nobody in them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world_size = recipe.parallel.world_size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _divide(recipe, create_gloo_process_groups=False)


def _first(ranks: list[int], *_split: int) -> list[int]:
    return ranks[:1]


def _divide(recipe: Recipe, **options: bool) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel, virtual = recipe.parallel, recipe.stage_count // recipe.parallel.pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Megatron joins the embedding with its copy on the last rank; there, none where a rank holds both ends.
        get_embedding_ranks=_first if recipe.pipeline.schedule in MIRRORED else None,
        **options,
    )
    torch.manual_seed(recipe.training.seed)
    # Generators whose states a CUDA graph can advance, where there are any.
    tensor_parallel.model_parallel_cuda_manual_seed(
        recipe.training.seed, use_cudagraphable_rng=torch.cuda.is_available()
    )


def stop() -> None:
    """Leave the process group."""
    from megatron.core import parallel_state

    from dsv3_train.runtime import pipeline_groups

    pipeline_groups.forget()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
