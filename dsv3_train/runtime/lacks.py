"""What a recipe needs and this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import launcher
from dsv3_train.runtime.environment import Gpu, Probe

Lack = tuple[Literal["error", "warning"], str]
"""An error keeps the run from starting or finishing; a warning is worth knowing before."""


def lacks(recipe: Recipe, found: Probe, state_bytes: int) -> list[Lack]:
    """What would keep a recipe from running on the machine that `probe` found, and what would slow it.

    Args:
        state_bytes: what one process holds at least (planner/states.py).
    """
    on_gpu = bool(found.gpus) if recipe.runtime.device == "auto" else recipe.runtime.device == "cuda"
    look = _on_gpus if on_gpu else _on_cpu
    return [*_processes(recipe, found), *look(recipe, found, state_bytes)]


def _processes_here(recipe: Recipe, found: Probe) -> int:
    """Processes of the run on this machine: all of them, or under a launcher one machine's share."""
    world, per_node = recipe.parallel.world_size, recipe.parallel.gpus_per_node
    try:
        joined = launcher.read(found.launcher, first_host=lambda nodes: "first")
    except UserError:
        joined = None
    return min(world, per_node) if joined else world


def _processes(recipe: Recipe, found: Probe) -> Iterator[Lack]:
    world = recipe.parallel.world_size
    try:
        joined = launcher.read(found.launcher, first_host=lambda nodes: "first")
    except UserError as error:
        yield "error", str(error)
        return
    if joined is not None and joined.world_size != world:
        yield "error", f"parallel.world_size: {world}, but {joined.world_size} processes were started; start {world}"


def _on_gpus(recipe: Recipe, found: Probe, state_bytes: int) -> Iterator[Lack]:
    if not found.gpus:
        yield "error", "runtime.device: cuda, but there is no GPU that torch can use; set runtime.device=cpu"
        return
    wanted, there = _processes_here(recipe, found), len(found.gpus)
    if wanted > there:
        per_node = recipe.parallel.gpus_per_node
        nodes = -(-recipe.parallel.world_size // per_node)
        fix = (
            f"start it on {nodes} machines of {per_node} with srun or torchrun" if nodes > 1 else "use fewer processes"
        )
        yield "error", f"parallel.world_size: {wanted} GPUs, and {there} here; {fix}"
    engine, blockwise = found.parts["transformer-engine"], found.parts["fp8-blockwise"]
    if not engine.works:
        yield "error", f"Transformer Engine, which every GPU run needs: {engine.note}"
    elif recipe.precision.fp8 == "blockwise" and not blockwise.works:
        yield "error", f"precision.fp8: blockwise cannot run here ({blockwise.note}); set precision.fp8=none"
    elif recipe.precision.fp8 == "mxfp8" and any(float(gpu.capability) < 10 for gpu in found.gpus):
        yield "error", "precision.fp8: mxfp8 needs Blackwell or newer; set precision.fp8=blockwise"
    if recipe.parallel.dispatcher == "deepep" and not found.parts["deepep"].works:
        yield "error", f"DeepEP: {found.parts['deepep'].note}; or set parallel.dispatcher=alltoall"
    yield from _gpu_memory(min(found.gpus, key=lambda gpu: gpu.free_gib), state_bytes / 2**30)


def _gpu_memory(gpu: Gpu, needed_gib: float) -> Iterator[Lack]:
    held = f"GPU memory: weights, gradients and optimizer take {needed_gib:.1f} GiB per process"
    if needed_gib > gpu.memory_gib:
        yield "error", f"{held}, of {gpu.memory_gib:.1f}; raise parallel.expert or parallel.pipeline"
    elif needed_gib > gpu.free_gib:
        yield "error", f"{held}, and only {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} are free; end what uses the GPU"
    elif needed_gib > 0.7 * gpu.memory_gib:
        yield "warning", f"{held}, of {gpu.memory_gib:.1f}: little is left for activations"


def _on_cpu(recipe: Recipe, found: Probe, state_bytes: int) -> Iterator[Lack]:
    # Recipes that say `cpu` were checked for the first three when they were read.
    if recipe.precision.fp8 not in ("none", "emulated"):
        yield "error", f"precision.fp8: {recipe.precision.fp8} needs a GPU; set precision.fp8=none"
    if recipe.parallel.dispatcher == "deepep":
        yield "error", "parallel.dispatcher: deepep needs GPUs; set parallel.dispatcher=alltoall"
    if recipe.parallel.context > 1:
        yield "error", "parallel.context: context parallelism needs GPUs; set parallel.context=1"
    if found.gpus:
        yield "error", "runtime.device: cpu is for machines without a GPU; start with CUDA_VISIBLE_DEVICES="
    elif recipe.runtime.device == "auto":
        yield "warning", "no GPU: the run would use the CPU"
    processes = _processes_here(recipe, found)
    needed_gib = processes * state_bytes / 2**30
    if needed_gib > found.free_memory_gib:
        yield (
            "error",
            f"memory: weights, gradients and optimizer of {processes} processes take {needed_gib:,.1f} GiB, "
            f"and {found.free_memory_gib:.1f} are free; use fewer processes or a smaller model",
        )
    if processes > found.cores:
        yield "warning", f"{processes} processes share {found.cores} cores"
