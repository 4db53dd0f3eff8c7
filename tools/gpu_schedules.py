"""Every pipeline schedule on the GPUs of one host, at the report's layer dimensions: losses, gradients, speed, overlap.

    python tools/gpu_schedules.py --gpus 8 --out DIR            # what fits into 9 minutes; --minutes for another
    python tools/gpu_schedules.py --gpus 4 --cpu --out DIR      # the same with tiny layers on a CPU's processes

`dsv3_671b_8xh200` (fewer layers and experts on fewer GPUs) in each layout under Megatron-core's 1F1B, its interleaved
schedule with overlapped all-to-all, DualPipe and DualPipeV, on the same weights and text; then a checkpoint that
changes layouts and a killed rank (gpu_elastic.py; --parts for one of the two). Cases with an all-to-all to hide come
first, should the time run short; DIR/results.json is written anew after every case, pipelines are drawn beside it. What
is timed and traced routes tokens evenly (`dsv3 profile run --balanced`). Cases that overlap pairs run in the
environment of recipes that do (NCCL_MAX_CTAS), the others without.

Gradients of step 1 are compared too (gpu_sketch.py). The yardstick is one schedule run twice: 1F1B by itself, and again
("1f1b again") in the processes of the cases that overlap pairs, with which those are compared, so that nothing that
their processes and environment do is taken for the schedule's.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu_sketch import distance, sketch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "distributed"))

STEPS = 6
SECONDS_PER_CASE = 60
"""What is left when a case begins, or as much as the longest took, without the first, which warms the machine up."""
SECONDS_OF_A_HANG = 360, 180
"""Without a finished case, after which the first in its processes, with a cold machine's imports and compilers (226 s
seen), and a later one (45 s) are given up."""
LAYOUTS = {8: [(4, 2), (2, 4)], 4: [(2, 2), (4, 1)], 2: [(2, 1)]}
"""(pipeline, expert) by number of GPUs."""
SCHEDULES = ("1f1b", "interleaved", "dualpipe", "dualpipev", "1f1b again")
TINY = [
    *("model.hidden_size=64", "model.num_attention_heads=4", "model.q_lora_rank=32", "model.kv_lora_rank=16"),
    *("model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8", "model.v_head_dim=16", "model.vocab_size=512"),
    *("model.moe_intermediate_size=32", "training.sequence_length=64", "data.prepare.vocab_size=512"),
]


@dataclass(frozen=True)
class Case:
    """One schedule in one layout."""

    pipeline: int
    expert: int
    schedule: str

    def __str__(self) -> str:
        return f"pp{self.pipeline}_ep{self.expert}_{self.schedule.replace(' ', '_')}"

    @property
    def overlaps(self) -> bool:
        return self.beside_pairs and self.schedule != "1f1b again"

    @property
    def beside_pairs(self) -> bool:
        """It runs in the processes, and the environment, of cases that overlap pairs."""
        return self.expert > 1 and self.schedule != "1f1b"

    @property
    def baseline(self) -> Case | None:
        """What its losses and gradients are compared with."""
        if self.schedule == "1f1b":
            return None
        return replace(self, schedule="1f1b again" if self.overlaps else "1f1b")


def recipe_of(case: Case, options: argparse.Namespace) -> Any:
    from dsv3_train.recipe.load import load
    from dsv3_train.recipe.schema import NO_FP8

    kind = case.schedule.removesuffix(" again")
    changes = [
        f"parallel={{world_size: {options.gpus}, pipeline: {case.pipeline}, expert: {case.expert}}}",
        f"pipeline={{schedule: {kind}, virtual_stages: {2 if kind == 'interleaved' else 1}}}",
        f"pipeline.overlap_pairs={str(case.overlaps).lower()}",
        f"model.num_hidden_layers={8 if options.gpus > 2 else 4}",
        f"model.n_routed_experts={max(16, 4 * options.gpus)}",
        f"training.micro_batch_size={options.micro_batch_size}",
        f"schedule.batch_size={4 * options.gpus * options.micro_batch_size}",
        f"data.prepare.output={options.work / 'data' / 'stdlib'}",
        "data.workers=0",
    ]
    if options.cpu:
        changes += [*TINY, *NO_FP8, "runtime.device=cpu"]
    return load("dsv3_671b_8xh200", changes)


def on_rank(cases: list[Case], options: argparse.Namespace) -> None:
    """One rank through all cases, as far as the time allows."""
    device = "cpu" if options.cpu else "cuda"
    from dsv3_train.runtime import distributed

    first = replace(cases[0], schedule="dualpipe") if cases[0].beside_pairs else cases[0]
    distributed.prepare_import(device, recipe_of(first, options))
    import torch
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    from dsv3_train.runtime.exchange import exchange
    from dsv3_train.runtime.rendezvous import Presence, meet

    # One place to meet for all cases: a second at the same port can be missed while the first one closes.
    store, _, _ = meet(Presence(int(os.environ["RANK"])), 600.0, options.gpus)
    longest = SECONDS_PER_CASE
    for case in cases:
        began, recipe = time.monotonic(), recipe_of(case, options)
        faulthandler.dump_traceback_later(SECONDS_OF_A_HANG[case != cases[0]] - 20)
        distributed.start(recipe, device, torch.distributed.PrefixStore(str(case), store))
        if not exchange(bool, began + longest < options.deadline, source=0)[0]:
            distributed.stop()
            return
        run_case(case, recipe, device, options, began)
        get_moe_layer_wise_logging_tracker().clear()  # it has this case's number of layers
        distributed.stop()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        if case != cases[0]:
            longest = max(longest, time.monotonic() - began)


def run_case(case: Case, recipe: Any, device: str, options: argparse.Namespace, began: float) -> None:
    """Losses of some steps, gradients of the first, then `dsv3 profile run`'s measurements; DIR/case.json at last."""
    import torch

    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.runtime.exchange import exchange
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.profile import Plan, RandomSteps, measure
    from dsv3_train.training.step import forward_backward, update

    where, leader = options.work / str(case), torch.distributed.get_rank() == 0
    where.mkdir(parents=True, exist_ok=True)
    before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0  # what earlier cases left
    schedules, trainer = Schedules(recipe), assemble(recipe, device, drawn_on=device)
    losses, first, sketched = [], None, None
    for step, mine in enumerate(batches_of(trainer, options, device, STEPS)):
        values = schedules.at(step * schedules.at(0).batch_size)
        losses.append(forward_backward(trainer, values, *mine).loss)
        if step == 0:
            first, sketched = mine[0], sketch(trainer, device)
        update(trainer, values)
        if step == 0 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # comparing takes copies
    built = time.monotonic() - began
    work = RandomSteps(recipe, device, trainer)
    work.batches = first
    measure(work, Plan(where, 2, 1, (0, options.gpus - 1), balanced=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    everyone = exchange(tuple[Any, Any], (peak, sketched))
    if leader:
        told = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU processes",
            "losses": losses,
            "memory_gib": [peak for peak, _ in everyone],
            "memory_gib_before": before,
            "seconds": {"to the sixth step": round(built), "in all": round(time.monotonic() - began)},
            "sketch": {name: row for _, one in reversed(everyone) for name, row in one.items()},
        }
        (where / "case.json.unfinished").write_text(json.dumps(told))
        (where / "case.json.unfinished").rename(where / "case.json")
    release(trainer)


def batches_of(
    trainer: Any, options: argparse.Namespace, device: str, steps: int
) -> Iterator[tuple[list[dict[str, Any]] | None, int]]:
    """Of the first steps, with real text: this rank's micro-batches, None where no stage needs them; their number."""
    from megatron.core import parallel_state

    from dsv3_train.data import batches, datasets
    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.training.step import micro_batches_per_step, needs_data

    recipe = trainer.recipe
    size = Schedules(recipe).at(0).batch_size
    data, _ = datasets.build(recipe, options.work / "cache", steps * size, 0)
    ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    numbers = [(step * size, size) for step in range(steps)]
    reader = batches.micro_batches(data, numbers, recipe.training.micro_batch_size, *ranks)
    count = micro_batches_per_step(recipe, size)
    for _ in range(steps):
        wanted = range(count if needs_data(trainer) else 0)
        mine = [{name: x.to(device) for name, x in next(reader).items()} for _ in wanted]
        yield mine or None, count


def release(trainer: Any) -> None:
    """Let go of the last micro-batch's graph, which routers and dispatchers keep, and with it, through the hooks of
    data parallelism, the whole model: a cycle through C++ that no collection finds."""
    for model in trainer.models:
        for module in model.modules():
            for holder in (module, getattr(module, "token_dispatcher", None)):
                for name, value in list(vars(holder).items()) if holder is not None else ():
                    if getattr(value, "grad_fn", None) is not None:
                        setattr(holder, name, None)


def figures_of(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What a case left, and what its traces and its measured pipelines say."""
    from dsv3_train.profiling.classes import table
    from dsv3_train.profiling.pipeline_page import write_pipelines
    from dsv3_train.profiling.report import of_rank
    from dsv3_train.profiling.trace import read
    from dsv3_train.profiling.work import works
    from dsv3_train.training.profile import trace_of

    where = options.work / str(case)
    told = json.loads((where / "case.json").read_text())
    timed = json.loads((where / "pipeline.json").read_text())
    pipelines, _, _ = write_pipelines(where, timed)
    (where / "pipeline.svg").replace(options.out / f"{case}.svg")
    kept = ("span_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "hidden_fraction", "idle_ms")
    kept += ("pairs", "exposures", "findings")
    traced = []
    for rank in (0, options.gpus - 1):
        of = of_rank(works([read(trace_of(where, rank))], table())[0])
        classes = {
            row["class"]: {"union_ms": row["union_ms"], "exposed_ms": row["exposed_ms"]}
            for row in of["classes"]
            if row["exposed_ms"] is not None
        }
        traced.append({"rank": rank, **{name: of[name] for name in kept}, "communication": classes})
    bubbles = ("bubble_fraction", "simulated_bubble_fraction", "ideal_bubble_fraction", "span_ms")
    return {
        **told,
        "compared_with": str(case.baseline),
        "step_ms": 1e3 * timed["step_seconds"],
        "tokens_per_second_per_gpu": timed["tokens_per_second"] / options.gpus,
        "tflops_per_gpu": timed["tflops_per_process"],
        "pipelines": [{name: one[name] for name in bubbles} | {"ms": one["ranks"][0]["ms"]} for one in pipelines],
        "traced": traced,
    }


def write_results(found: dict[str, Any], options: argparse.Namespace) -> None:
    """What there is so far, compared with 1F1B of the same layout."""
    for told in found.values():
        baseline = found.get(told.get("compared_with"), {})
        if "sketch" not in told or "sketch" not in baseline:
            continue
        told["gradients"] = distance(baseline["sketch"], told["sketch"])
        pairs = zip(told["losses"], baseline["losses"], strict=True)
        told["loss_difference"] = max(abs(a / b - 1) for a, b in pairs)
    plain = {name: {key: value for key, value in told.items() if key != "sketch"} for name, told in found.items()}
    unfinished = options.out / "results.json.unfinished"
    unfinished.write_text(json.dumps({"gpus": options.gpus, "cases": plain}, indent=1))
    unfinished.rename(options.out / "results.json")


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = "case|step ms|tok/s/GPU|bubble %|simulated %|exposed ms|hidden %|a2a ms|a2a exposed|in pairs %|peak GiB"
    table = Table(*titles.split("|"), "loss", "grad.")
    table.columns[0].no_wrap = True
    for name, told in found.items():
        if "losses" not in told:
            table.add_row(name, told["failed"])
            continue
        pipe, (traced, *_) = told["pipelines"][0], told["traced"]
        peaks = [peak for peak in told["memory_gib"] if peak is not None]
        share = _all_to_all((traced["pairs"] or {"communication": []})["communication"])
        rates = [traced["hidden_fraction"], 1 - share[1] / share[0] if share[0] else None]
        hidden, paired = ("-" if rate is None else f"{100 * rate:.1f}" for rate in rates)
        whole = _all_to_all([{"class": name, **row} for name, row in traced["communication"].items()])
        table.add_row(
            name,
            f"{told['step_ms']:.0f}",
            f"{told['tokens_per_second_per_gpu']:.0f}",
            f"{100 * pipe['bubble_fraction']:.1f}",
            f"{100 * pipe['simulated_bubble_fraction']:.1f}",
            f"{traced['exposed_comm_ms']:.0f}",
            hidden,
            *(f"{ms:.0f}" for ms in whole),
            paired,
            f"{max(peaks):.0f}" if peaks else "-",
            f"{told.get('loss_difference', 0):.1e}",
            f"{told['gradients']['all']:.1e}" if "gradients" in told else "-",
        )
    Console(width=170).print(table)
    print("exposed, hidden: of all communication, where a receive that waits for the pipeline counts; a2a: all-to-all")


def _all_to_all(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Milliseconds, and of them exposed."""
    mine = [row for row in rows if "all-to-all" in row["class"]]
    return sum(row["union_ms"] for row in mine), sum(row["exposed_ms"] for row in mine)


def drive(cases: list[Case], found: dict[str, Any], options: argparse.Namespace) -> None:
    """Run cases in one set of processes; when a case ends them, the others in new ones."""
    from dsv3_train.runtime.launch import launch

    while cases and time.monotonic() + SECONDS_PER_CASE < options.deadline:
        # "cpu": forked. For GPUs `launch` starts the command line again, which is not this program. Nothing here has
        # touched CUDA.
        process = multiprocessing.get_context("fork").Process(
            target=launch, args=(lambda cases=cases: on_rank(cases, options), options.gpus, "cpu")
        )
        process.start()
        given_up = time.monotonic() + SECONDS_OF_A_HANG[0]
        while True:
            process.join(0.5)
            ended = not process.is_alive()
            for case in [case for case in cases if (options.work / str(case) / "case.json").exists()]:
                cases = [other for other in cases if other != case]
                given_up = time.monotonic() + SECONDS_OF_A_HANG[1]
                try:
                    found[str(case)] = figures_of(case, options)
                    print(f"{case}: {found[str(case)]['step_ms']:.0f} ms a step", flush=True)
                except Exception as error:  # what it left stays in --work; the ranks are at the next case
                    traceback.print_exc()
                    found[str(case)] = {"failed": f"its figures: {type(error).__name__}: {error}"}
                write_results(found, options)
            if time.monotonic() > given_up:
                process.kill()  # its ranks die with it
            if ended:
                break
        if process.exitcode and cases:
            found[str(cases[0])] = {"failed": f"exit code {process.exitcode}; see what was printed"}
            cases = cases[1:]
        elif cases:
            break  # out of time
    for case in cases:
        found.setdefault(str(case), {"failed": "not run: out of time"})
    write_results(found, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_schedules"), help="data, traces, checkpoints")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--micro-batch-size", type=int, default=2, help="sequences; of one, launches weigh more than kernels"
    )
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of their names, as pp2_ep2_dualpipe*")
    parser.add_argument("--parts", nargs="+", choices=("schedules", "elastic"), default=["schedules", "elastic"])
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if "schedules" in options.parts:
        run_schedules(options)
    if "elastic" in options.parts:
        from gpu_elastic import change_layout

        found = json.dumps(change_layout(options), indent=1)
        print(found)
        (options.out / "elastic.json").write_text(found)


def run_schedules(options: argparse.Namespace) -> None:
    """All cases; figures as they come."""
    from dsv3_train.data.prepare import prepare

    cases = [Case(*layout, schedule) for layout in LAYOUTS[options.gpus] for schedule in SCHEDULES]
    cases = [case for case in cases if any(fnmatch(str(case), pattern) for pattern in options.cases)]
    for case in cases:  # what an earlier call left would pass for this one's
        shutil.rmtree(options.work / str(case), ignore_errors=True)
    prepare(recipe_of(cases[0], options).data.prepare)
    found: dict[str, Any] = {}
    for beside_pairs in (True, False):
        drive([case for case in cases if case.beside_pairs == beside_pairs], found, options)
    show(found)


if __name__ == "__main__":
    main()
