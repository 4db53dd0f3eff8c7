"""`dsv3 train RECIPE --dry-run`: what a run would be, worked out on any machine."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict

from dsv3_train.optim.schedules import Schedules
from dsv3_train.planner.activations import countable, moe_layer_bytes
from dsv3_train.recipe.load import load
from dsv3_train.recipe.ready import refuse_unbuilt
from dsv3_train.recipe.schema import Recipe

_SHOWN = (0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)


def dry_run(ref: str, overrides: list[str], as_json: bool) -> None:
    """Print sizes, layout and schedules of a recipe; every stage is built on the meta device.

    Raises:
        UserError: the recipe is at fault, or wants what the model cannot be built for yet.
    """
    recipe = load(ref, overrides)
    refuse_unbuilt(recipe)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here computes, and a GPU machine must answer the same
    from dsv3_train.runtime import distributed

    distributed.prepare_import("cpu")
    from dsv3_train.planner.account import account

    counted = account(recipe)
    schedules = Schedules(recipe)
    report = {
        "recipe": recipe.name,
        "parameters": {"main": counted.main, "mtp": counted.mtp, "active": counted.active},
        "world_size": recipe.parallel.world_size,
        "total_steps": schedules.total_steps,
        "total_tokens": schedules.total_tokens,
        "stages": [asdict(stage) for stage in counted.stages],
        "moe_layer_activation_bytes": _activations(recipe),
        "schedule": [_at(recipe, schedules, share) for share in _SHOWN],
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print(recipe, report, ref, overrides)


def _activations(recipe: Recipe) -> dict[str, int] | None:
    """Of one layer and micro-batch in flight, by what they are; None where nobody has counted."""
    if not countable(recipe):
        return None
    training = recipe.training
    return moe_layer_bytes(recipe, training.sequence_length * training.micro_batch_size // recipe.parallel.context)


def _at(recipe: Recipe, schedules: Schedules, share: float) -> dict:
    """Schedule values at a share of the run's tokens (of the step that begins there)."""
    length = recipe.training.sequence_length
    samples = min(int(share * schedules.total_tokens), schedules.total_tokens - 1) // length
    return {"consumed_tokens": samples * length, **asdict(schedules.at(samples))}


def _print(recipe: Recipe, report: dict, ref: str, overrides: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    sizes = report["parameters"]
    console.print(f"{recipe.name}  {recipe.description}")
    console.print(
        f"{sizes['main']:,} parameters + {sizes['mtp']:,} for MTP, routing biases included; "
        f"{sizes['active']:,} active per token"
    )
    p = recipe.parallel
    console.print(
        f"{p.world_size:,} processes = DP {p.data} x PP {p.pipeline} x CP {p.context} x TP {p.tensor}, EP {p.expert}; "
        f"schedule {recipe.pipeline.schedule}, ZeRO-1 {'on' if p.zero1 else 'off'}, "
        f"{recipe.precision.params}, FP8 {recipe.precision.fp8}"
    )
    console.print(f"{report['total_tokens']:,} tokens in {report['total_steps']:,} steps")
    if report["moe_layer_activation_bytes"]:
        gib = sum(report["moe_layer_activation_bytes"].values()) / 2**30
        console.print(f"{gib:.2f} GiB of activations per MoE layer and micro-batch in flight, counted from shapes")
    table = Table(title="Stages (E embedding, t layer, m MTP, L output head)")
    for heading in ("pipeline rank", "virtual stage", "layers", "parameters", "per process"):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    for stage in report["stages"]:
        table.add_row(
            str(stage["pipeline_rank"]),
            str(stage["virtual_stage"]),
            stage["layers"],
            f"{stage['parameters']:,}",
            f"{stage['parameters_per_rank']:,}",
        )
    console.print(table)
    table = Table(title="Schedules")
    for heading in ("tokens", "learning rate", "batch", "MTP weight", "bias speed"):
        table.add_column(heading, justify="right")
    for row in report["schedule"]:
        table.add_row(
            f"{row['consumed_tokens']:,}",
            f"{row['lr']:.4g}",
            f"{row['batch_size']:,}",
            f"{row['mtp_weight']:g}",
            f"{row['bias_update_speed']:g}",
        )
    console.print(table)
    command = shlex.join(["dsv3", "train", ref, *overrides])
    nodes = -(-p.world_size // p.gpus_per_node)
    if nodes > 1:
        command = f"srun --nodes={nodes} --ntasks-per-node={min(p.gpus_per_node, p.world_size)} {command}"
    console.print(f"To run it: {command}")
