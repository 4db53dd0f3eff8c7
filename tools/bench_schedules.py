"""Measured bubbles of every schedule, with sleeps for kernels, beside the simulator and Megatron-core's own schedules.

    python tools/bench_schedules.py --ranks 4 8 --micro-batches 16 --unit-ms 30

Each rank is a process on this machine that sleeps where it would compute (F, I and W one unit each for the layers of a
rank), so that the processes do not need a core each; messages and all bookkeeping are real. Megatron-core's 1F1B and
interleaved schedules run the same modules in the same way. The last column is the time per operation without any sleep.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from dsv3_train.recipe.chunks import SCHEDULED, stage_count
from dsv3_train.recipe.load import load
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from dsv3_train.runtime.launch import launch

KINDS = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "dualpipe")
HIDDEN = 64


def recipe(kind: str, ranks: int) -> Recipe:
    """A recipe of two layers a rank under a schedule."""
    virtual = 2 if kind == "interleaved" else 1
    return load(
        "smoke",
        [
            f"parallel={{world_size: {ranks}, pipeline: {ranks}}}",
            f"pipeline={{schedule: {kind}, virtual_stages: {virtual}}}",
            f"model.num_hidden_layers={2 * ranks}",
            f"model.hidden_size={HIDDEN}",
            "model.num_nextn_predict_layers=0",
            "schedule.mtp_weight=0",
            "schedule.batch_size=64",
            "training.micro_batch_size=1",
        ],
    )


def make_stage(config, unit: float, spans: list):
    """A stage that sleeps: `unit` seconds each for F, I and W."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    from dsv3_train.model import weight_gradients

    def busy() -> None:
        start = time.perf_counter()
        if unit:
            time.sleep(unit)
        spans.append((start, time.perf_counter()))

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            busy()
            ctx.save_for_backward(weight)
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            def product():
                busy()
                return torch.zeros(1)

            busy()
            (weight,) = ctx.saved_tensors
            return gradient * 1.0, weight_gradients.take(weight, product)

    class Stage(MegatronModule):
        model_type = ModelType.encoder_or_decoder

        def __init__(self) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.weight.main_grad = torch.zeros(1)
            self.input = None

        def set_input_tensor(self, tensors) -> None:
            self.input = tensors[0] if isinstance(tensors, list) else tensors

        def forward(self):
            x = self.input if self.input is not None else torch.ones(8, 1, HIDDEN, requires_grad=True)
            return Sleep.apply(x, self.weight)

    return Stage()


def forward_step(iterator, model):
    """Megatron-core's: output and loss function."""
    return model(), lambda output: (output.sum(), torch.tensor(1, dtype=torch.int), {"loss": output.sum().detach()})


def work(settings: Recipe, micro_batches: int, unit: float, steps: int, out: Path) -> None:
    """One rank: `steps` global batches; their spans and number of computations into `out`."""
    distributed.start(settings, "cpu")
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.stage import places
    from dsv3_train.pipeline.executor import Executor
    from dsv3_train.pipeline.messages import Messages
    from dsv3_train.runtime import pipeline_groups

    config, mine, kind = megatron_config(settings, "cpu"), places(settings), settings.pipeline.schedule
    config.num_moe_experts = None  # no balance loss to scale
    spans: list = []
    model = [make_stage(config, unit / len(mine) if kind != "dualpipe" else unit, spans) for _ in mine]
    run, several = get_forward_backward_func(), len(mine) > 1
    if kind in SCHEDULED:
        up = parallel_state.get_pipeline_model_parallel_group()
        messages = Messages(up, pipeline_groups.downward(), torch.float32, headers=False, checked=False)
        run, several = Executor(kind, mine, messages, defer=True, overlap=False), True
    result = []
    for _ in range(steps):
        spans.clear()
        torch.distributed.barrier()
        run(
            forward_step_func=forward_step,
            data_iterator=[None] * len(mine) if several else None,
            model=model if several else model[0],
            num_microbatches=micro_batches,
            seq_length=8,
            micro_batch_size=1,
            decoder_seq_length=8,
            forward_only=False,
        )
        result.append(list(spans))
    torch.save(result, out / f"{torch.distributed.get_rank()}.pt")
    distributed.stop()


def measure(kind: str, ranks: int, micro_batches: int, unit: float, steps: int) -> tuple[float, float]:
    """Median over steps (the first left out) of the bubble fraction, and of seconds per computation on a rank."""
    settings = recipe(kind, ranks)
    with tempfile.TemporaryDirectory() as folder:
        launch(lambda: work(settings, micro_batches, unit, steps, Path(folder)), ranks, "cpu")
        per_rank = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    bubbles, overheads = [], []
    for step in list(zip(*per_rank, strict=True))[1:]:
        first, last = min(rank[0][0] for rank in step), max(rank[-1][1] for rank in step)
        busy = [sum(end - start for start, end in rank) for rank in step]
        bubbles.append(max(1 - time_ / (last - first) for time_ in busy))
        overheads.append((last - first) / max(len(rank) for rank in step))
    return sorted(bubbles)[len(bubbles) // 2], sorted(overheads)[len(overheads) // 2]


def simulated(kind: str, ranks: int, micro_batches: int) -> float:
    """The simulator's bubble fraction."""
    from dsv3_train.pipeline.durations import Durations
    from dsv3_train.pipeline.generate import build
    from dsv3_train.pipeline.simulate import simulate

    schedule = build(kind, ranks, micro_batches)
    return simulate(schedule, Durations(F=1, I=1, W=1, FB=3).of(schedule)).bubble_fraction


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--unit-ms", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    distributed.prepare_import("cpu")
    from dsv3_train.model import weight_gradients  # noqa: F401  imported once, before ranks are forked

    rows = []
    for ranks in options.ranks:
        for kind in KINDS:
            bubble, _ = measure(kind, ranks, options.micro_batches, options.unit_ms / 1e3, options.steps)
            _, seconds = measure(kind, ranks, options.micro_batches, 0.0, options.steps)
            rows.append(
                {
                    "schedule": kind,
                    "executor": "ours" if kind in SCHEDULED else "Megatron-core",
                    "ranks": ranks,
                    "stages": stage_count(kind, ranks, 2),
                    "measured_bubble": bubble,
                    "simulated_bubble": simulated(kind, ranks, options.micro_batches),
                    "microseconds_per_operation": seconds * 1e6,
                }
            )
            if not options.json:
                row = rows[-1]
                print(
                    f"{kind:12s} P={ranks} {row['executor']:14s} measured {bubble:6.1%}  "
                    f"simulated {row['simulated_bubble']:6.1%}  {seconds * 1e6:6.0f} us per operation",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"micro_batches": options.micro_batches, "unit_ms": options.unit_ms, "schedules": rows}))


if __name__ == "__main__":
    main()
