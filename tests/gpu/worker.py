"""What torchrun starts on each GPU: `torchrun --nproc-per-node 2 worker.py WHAT RECIPE.json OUT`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed

MICRO_BATCHES = 6


def pairs(recipe: Recipe, out: Path) -> None:
    """A stage's forward and backward passes one after the other, then in pairs through the schedule plan.

    Leaves in OUT/RANK.json losses, gradients' differences, step times and what the profiler saw of both.
    """
    from megatron.core import parallel_state

    from dsv3_train.pipeline.executor import Executor
    from dsv3_train.pipeline.messages import Messages
    from dsv3_train.runtime import pipeline_groups
    from dsv3_train.training import assemble as assembling

    distributed.start(recipe, "cuda")
    pipeline_groups.create(recipe)
    plain = assembling.megatron_config

    def settings(*args: Any) -> Any:
        config = plain(*args)
        config.overlap_moe_expert_parallel_comm = config.delay_wgrad_compute = True
        return config

    assembling.megatron_config = settings
    trainer = assembling.assemble(recipe, "cuda")
    assembling.weight_gradients.install()
    group = parallel_state.get_pipeline_model_parallel_group()
    results: dict[str, Any] = {"rank": torch.distributed.get_rank(), "gpu": torch.cuda.get_device_name()}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, overlap in (("one by one", False), ("one by one again", False), ("in pairs", True)):
        messages = Messages(group, pipeline_groups.downward(), torch.bfloat16, headers=False, checked=False)
        places = [model.place for model in trainer.models]
        trainer.executor = Executor("1f1b", places, messages, defer=True, overlap=overlap)
        trainer.executor.schedule = lambda count, evaluation: _one_rank(count)
        trace = out / f"{results['rank']}.{name.replace(' ', '_')}.json.gz"
        results[name], gradients[name] = _measure(trainer, recipe, trace)
    names = [name for name, _ in trainer.models[0].named_parameters()]
    for name in ("one by one again", "in pairs"):
        differences = [
            float((got - want).norm() / want.norm().clamp(min=1e-30))
            for got, want in zip(gradients[name], gradients["one by one"], strict=True)
        ]
        results[name]["gradient_difference"], results[name]["of"] = max(zip(differences, names, strict=True))
    (out / f"{results['rank']}.json").write_text(json.dumps(results))
    distributed.stop()


def _one_rank(count: int) -> Any:
    """F, then F&B pairs, and the last backward with its weight gradients apart."""
    from dsv3_train.pipeline.operations import Compute, Op, Schedule

    middle = [Compute((Op("F", 0, 0, m), Op("B", 0, 0, m - 1))) for m in range(1, count)]
    last = [Compute((Op(kind, 0, 0, count - 1),)) for kind in ("I", "W")]
    return Schedule("1f1b", 1, 1, (count,), ((Compute((Op("F", 0, 0, 0),)), *middle, *last),))


def _measure(trainer: Any, recipe: Recipe, trace: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Loss and gradients as the model routes; times and trace with tokens spread evenly."""
    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.profiling.classes import table
    from dsv3_train.profiling.report import report
    from dsv3_train.profiling.trace import read
    from dsv3_train.profiling.work import works
    from dsv3_train.training.profile import balance
    from dsv3_train.training.step import forward_backward

    values = Schedules(recipe).at(0)
    length, sequences = recipe.training.sequence_length, recipe.training.micro_batch_size
    vocabulary = recipe.model.vocab_size
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    batches = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(0, vocabulary, (sequences, length + 1), generator=generator).cuda()
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "position_ids": torch.arange(length, device="cuda").repeat(sequences, 1),
                "loss_mask": torch.ones(sequences, length, device="cuda"),
            }
        )

    def step() -> Any:
        return forward_backward(trainer, values, batches, MICRO_BATCHES)

    losses = step()
    gradients = [parameter.main_grad.clone().cpu() for parameter in trainer.models[0].parameters()]
    balance(trainer)
    step()
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    balance(trainer, False)
    figures = report(works([read(trace)], table()))
    leave_out = ("ranges", "largest", "steps", "gemm", "file", "unclassified", "streams")
    streams = [{key: row[key] for key in row if key != "classes"} for row in figures["streams"]]
    told = {
        "loss": losses.loss,
        "step_ms": 1e3 * sorted(seconds)[1],
        "paired": trainer.executor.paired,
        **{key: figures[key] for key in figures if key not in leave_out},
        "streams": streams,
    }
    return told, gradients


def main() -> None:
    what, recipe_file, out = sys.argv[1:]
    recipe = Recipe.model_validate_json(Path(recipe_file).read_text(encoding="utf-8"))
    if what == "pairs":  # as runtime/gpu_environment.py has it where the recipe overlaps pairs
        sms = str(recipe.pipeline.communication_sms)
        os.environ.update(CUDA_DEVICE_MAX_CONNECTIONS="32", NCCL_MAX_CTAS=sms)
        os.environ.update(NVTE_FWD_LAYERNORM_SM_MARGIN=sms, NVTE_BWD_LAYERNORM_SM_MARGIN=sms)
    distributed.prepare_import("cuda", recipe)
    if what == "train":
        from parity import train

        train(recipe, Path(out), device="cuda", steps=3)
    elif what == "states":
        from test_gather import compare

        compare(recipe, Path(out), "cuda")
    else:
        pairs(recipe, Path(out))


if __name__ == "__main__":
    main()
