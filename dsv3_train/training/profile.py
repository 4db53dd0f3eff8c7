"""What `dsv3 profile run` does: a few steps timed, a few traced, and the reports of both."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_train.errors import UserError
from dsv3_train.pipeline.simulate import Span
from dsv3_train.recipe.load import load
from dsv3_train.recipe.ready import refuse_unready
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch
from dsv3_train.runtime.launcher import join
from dsv3_train.training.machine import refuse_machine, told_when_full

if TYPE_CHECKING:
    from dsv3_train.profiling.spans import Spans


@dataclass(frozen=True)
class Plan:
    """What to run, and where its files go."""

    out: Path
    steps: int
    """Timed without a profiler, and then as many traced."""
    warmup: int
    ranks: tuple[int, ...]
    """Those that write a trace."""
    balanced: bool = False
    """Every expert is sent about as many tokens."""


def ready(ref: str, overrides: list[str]) -> Recipe:
    """The recipe, if it can train.

    Raises:
        UserError: it cannot.
    """
    recipe = load(ref, overrides)
    refuse_unready(recipe)
    return recipe


def run(recipe: Recipe, plan: Plan, done: Callable[[], None]) -> None:
    """Train on random tokens, in as many processes as the recipe wants; traces and `pipeline.json` into `plan.out`.

    Args:
        done: called on rank 0 when all files are there.

    Raises:
        UserError: ranks or machine are at fault.
    """
    world = recipe.parallel.world_size
    beyond = [rank for rank in plan.ranks if not 0 <= rank < world]
    if beyond:
        raise UserError(f"--ranks: {beyond[0]} is none of the recipe's {world} ranks (0 to {world - 1})")
    device = distributed.device_of(recipe)
    if join() is None:
        refuse_machine(recipe, device)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{plan.out}: cannot be made ({error.strerror or error})") from None
    if device == "cpu":
        _import(recipe, device)  # once, before ranks are forked
    launch(lambda: _on_rank(recipe, device, plan, done), world, device)


def trace_of(out: Path, rank: int) -> Path:
    """Where a rank's trace goes: a name that TensorBoard's plugin knows."""
    return out / f"rank{rank}.pt.trace.json.gz"


def _import(recipe: Recipe, device: str) -> None:
    distributed.prepare_import(device, recipe)
    from dsv3_train.training import assemble, step  # noqa: F401


def _on_rank(recipe: Recipe, device: str, plan: Plan, done: Callable[[], None]) -> None:
    _import(recipe, device)
    import torch

    from dsv3_train.training.assemble import assemble

    distributed.start(recipe, device)
    with told_when_full(recipe):
        measure(RandomSteps(recipe, device, assemble(recipe, device, drawn_on=device)), plan)
    leader = torch.distributed.get_rank() == 0
    distributed.stop()
    if leader:
        done()


def measure(work: RandomSteps, plan: Plan) -> None:
    """Some steps timed, some traced; traces and `pipeline.json` into `plan.out`. Collective."""
    import torch

    from dsv3_train.profiling.spans import Spans

    if plan.balanced:
        balance(work.trainer)
    for _ in range(plan.warmup + (work.trainer.graph is not None)):  # a graph is recorded in the second step
        work.step()
    spans, seconds, recorded = Spans(work.trainer), [], []
    for _ in range(plan.steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        with spans.recording():
            work.step()
        seconds.append(time.perf_counter() - start)
        recorded.append(spans.last())
    gathered = _gather(recorded)
    _trace(work, plan, torch.distributed.get_rank(), spans)
    if torch.distributed.get_rank() == 0:
        _write(plan.out / "pipeline.json", json.dumps(_timed(work, seconds, gathered), indent=1) + "\n")
    torch.distributed.barrier()


def balance(trainer: Any, even: bool = True) -> None:
    """Let routers choose by random logits, so that no rank waits for one with more tokens; or by their weights again.

    DeepSeek's published profile is of "an absolutely balanced MoE routing strategy" too
    (github.com/deepseek-ai/profile-data).
    """
    from megatron.core.transformer.moe.router import TopKRouter

    for model in trainer.models:
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.config.moe_router_force_load_balancing = even


class RandomSteps:
    """Steps of the recipe's last batch size on the same random tokens."""

    def __init__(self, recipe: Recipe, device: str, trainer: Any) -> None:
        import torch

        from dsv3_train.optim.schedules import Schedules
        from dsv3_train.training.step import micro_batches_per_step, needs_data

        self.recipe, self.device, self.trainer = recipe, device, trainer
        schedules = Schedules(recipe)
        self.values = schedules.at(schedules.total_samples - 1)
        self.count = micro_batches_per_step(recipe, self.values.batch_size)
        size, length = recipe.training.micro_batch_size, recipe.training.sequence_length

        def batch() -> dict[str, torch.Tensor]:
            tokens = torch.randint(0, recipe.model.vocab_size, (size, length + 1), device=device)
            return {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "position_ids": torch.arange(length, device=device).expand(size, -1).contiguous(),
                "loss_mask": torch.ones(size, length, device=device),
            }

        self.batches = [batch() for _ in range(self.count)] if needs_data(trainer) else None

    def step(self) -> None:
        """One optimizer step; done when the device is."""
        import torch

        from dsv3_train.profiling.named_ranges import named
        from dsv3_train.training.step import forward_backward, update

        forward_backward(self.trainer, self.values, self.batches, self.count)
        with named("optimizer"):
            update(self.trainer, self.values)
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class _Recorded:
    """What a rank recorded."""

    pipeline: list[int]
    """Ranks of its pipeline, in order."""
    steps: list[tuple[Span, ...]]
    ahead: float
    """Seconds by which its clock is ahead of rank 0's."""


def _gather(recorded: list[tuple[Span, ...]]) -> list[_Recorded]:
    """Of every rank: its pipeline and place in it, how far its clock is ahead, and its spans per step. Collective."""
    import torch
    from megatron.core import parallel_state

    from dsv3_train.profiling.clocks import offsets
    from dsv3_train.runtime.exchange import exchange

    ahead = offsets()
    pipeline = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    return exchange(_Recorded, _Recorded(pipeline, recorded, ahead[torch.distributed.get_rank()]))


def _trace(work: RandomSteps, plan: Plan, rank: int, spans: Spans) -> None:
    """As many steps again, under torch.profiler on the chosen ranks; one more warms the profiler up."""
    import torch

    from dsv3_train.profiling.named_ranges import named_ranges

    traced = rank in plan.ranks
    activities = [torch.profiler.ProfilerActivity.CPU]
    if work.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=plan.steps, repeat=1),
        on_trace_ready=lambda done: _export(done, trace_of(plan.out, rank)),
    )
    with named_ranges(work.trainer) if traced else nullcontext(), profiler if traced else nullcontext():
        for _ in range(1 + plan.steps):
            with spans.recording():  # which names passes and pairs in the trace
                work.step()
            if traced:
                profiler.step()


def _export(profiler: Any, path: Path) -> None:
    partial = path.with_name(f"unfinished-{path.name}")
    try:
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from None


def _timed(work: RandomSteps, seconds: list[float], gathered: list[_Recorded]) -> dict[str, Any]:
    """Speed, and what was recorded of every pipeline."""
    from dsv3_train.planner.flops import flops_per_token

    recipe, step = work.recipe, statistics.median(seconds)
    length = recipe.training.sequence_length
    tokens = work.values.batch_size * length
    flops = flops_per_token(recipe.model, length, mtp=True) * tokens / recipe.parallel.world_size
    pipelines = sorted({tuple(one.pipeline) for one in gathered})
    schedule = recipe.pipeline
    return {
        "recipe": recipe.name,
        "device": work.device,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "tflops_per_process": flops / step / 1e12,
        "kind": schedule.schedule,
        "virtual": schedule.virtual_stages,
        "defer": schedule.defer_weight_gradients,
        "pairs": schedule.schedule == "interleaved" and recipe.overlaps_pairs,  # the dual ones always have them
        "micro_batches": work.count,
        "pipelines": [
            {
                "ranks": ranks,
                "ahead": [gathered[r].ahead for r in ranks],
                "steps": [gathered[r].steps for r in ranks],
            }
            for ranks in pipelines
        ],
    }


def _write(path: Path, text: str) -> None:
    from dsv3_train.whole import write

    write(path, text)
