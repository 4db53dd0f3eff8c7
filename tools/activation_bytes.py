"""Activation bytes held per MoE layer, measured on a GPU that stands for a rank of EP64, beside the count from shapes.

    python tools/activation_bytes.py [--layers 4] [--out FILE.json]

The report's dimensions, 4096 tokens, 256 experts of which this rank has 4. torch's `fake` process group gives the
sizes; its collectives are replaced by ones that assume that every peer holds what this rank holds, so that
Megatron-core's dispatcher runs for real and every local expert gets its share of rows (routing is forced to be even).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GIB = 2**30
ALL = ["layernorm", "mla_up_proj", "moe_act"]
CASES: list[tuple[str, list[str], dict[str, str]]] = [
    ("BF16", [], {}),
    ("BF16, recompute", ALL, {}),
    ("BF16, recompute, caches", ALL, {"swiglu_input": "fp8", "attention_output": "e5m6"}),
    ("FP8", [], {"fp8": "blockwise"}),
    ("FP8, recompute norms", ["layernorm"], {"fp8": "blockwise"}),
    ("FP8, recompute MLA up", ["mla_up_proj"], {"fp8": "blockwise"}),
    ("FP8, recompute SwiGLU", ["moe_act"], {"fp8": "blockwise"}),
    ("FP8, recompute", ALL, {"fp8": "blockwise"}),
    ("FP8, recompute, SwiGLU FP8", ALL, {"fp8": "blockwise", "swiglu_input": "fp8"}),
    ("FP8, recompute, attention E5M6", ALL, {"fp8": "blockwise", "attention_output": "e5m6"}),
    (
        "the report's",
        ALL,
        {"fp8": "blockwise", "swiglu_input": "fp8", "attention_output": "e5m6", "fp8_dispatch": "true"},
    ),
]


class _Done:
    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def stand_in_for_peers() -> None:
    """Collectives of a rank whose peers all hold what it holds."""

    def done(asynchronous: bool) -> _Done | None:
        return _Done() if asynchronous else None

    def all_to_all(out, x, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        # One copy: every peer holds what we hold, so rows of ours stand for those that arrive.
        taken = 0
        while taken < out.size(0):
            piece = min(out.size(0) - taken, x.size(0))
            out[taken : taken + piece].copy_(x[:piece])
            taken += piece
        return done(async_op)

    def all_gather(out, x, group=None, async_op=False):
        count = dist.get_world_size(group)
        out.view(count, -1).copy_(x.reshape(1, -1).expand(count, -1))
        return done(async_op)

    def all_reduce(x, op=None, group=None, async_op=False):
        if op in (None, dist.ReduceOp.SUM):
            x.mul_(dist.get_world_size(group))
        return done(async_op)

    dist.all_to_all_single = all_to_all
    dist.all_gather_into_tensor = dist._all_gather_base = all_gather
    dist.all_reduce = all_reduce
    import megatron.core.tensor_parallel.mappings as mappings

    if hasattr(mappings, "dist_all_gather_func"):
        mappings.dist_all_gather_func = all_gather


def recipe_of(layers: int, recompute: list[str], precision: dict[str, str]) -> Any:
    from dsv3_train.recipe.load import load
    from dsv3_train.recipe.schema import NO_FP8

    return load(
        "dsv3_671b_2048xh800",
        [
            "parallel={world_size: 64, expert: 64}",
            "pipeline={schedule: 1f1b}",
            f"model.num_hidden_layers={layers}",
            "model.first_k_dense_replace=0",
            "model.vocab_size=1024",
            "model.num_nextn_predict_layers=0",
            "schedule.mtp_weight=0",
            f"training.recompute=[{', '.join(recompute)}]",
            "data.train=[{path: unused}]",
            *NO_FP8,
            *(f"precision.{key}={value}" for key, value in precision.items()),
        ],
    )


def measure(layers: int, recompute: list[str], precision: dict[str, str]) -> dict[str, float]:
    """GiB held after a forward pass per layer, and the time of a forward and backward pass, warm."""
    from dsv3_train.model.build import build_stage, in_training_precision
    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.stage import Place

    recipe = recipe_of(layers, recompute, precision)
    config = megatron_config(recipe, "cuda")
    config.moe_router_force_load_balancing = True
    # A stage in the middle: layers alone.
    chunk = build_stage(recipe, config, Place(0, 1, 3, None, mirrored=False, replica=False))
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.006)
    model = in_training_precision(chunk, config)
    length, hidden = recipe.training.sequence_length, recipe.model.hidden_size
    x = torch.randn(length, 1, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)
    places = torch.arange(length, device="cuda")[None]
    held = []

    def step() -> None:
        before = torch.cuda.memory_allocated()
        chunk.set_input_tensor(x)
        y = model(None, places, None)
        held.append(torch.cuda.memory_allocated() - before)
        y.backward(gradient)
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    output = x.nbytes / layers  # what the stage hands on is held by the next one
    return {
        "held_gib": (held[-1] / layers - output) / GIB,
        "peak_gib": (torch.cuda.max_memory_allocated() - base) / GIB,
        "step_ms": 1e3 * sorted(times)[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the table here as JSON too")
    arguments = parser.parse_args()
    from dsv3_train.planner.activations import moe_layer_bytes
    from dsv3_train.runtime import distributed

    torch.cuda.set_device(0)
    first = recipe_of(arguments.layers, [], {})
    distributed.prepare_import("cuda", first)
    distributed.pretend(first, 0)
    stand_in_for_peers()
    rows = []
    print(
        f"{'':34} measured   counted   step ms   peak GiB   ({arguments.layers} layers, {torch.cuda.get_device_name()})"
    )
    for name, recompute, precision in CASES:
        counted = sum(moe_layer_bytes(recipe_of(arguments.layers, recompute, precision), 4096).values()) / GIB
        try:
            row = measure(arguments.layers, recompute, precision)
        except Exception as error:  # a case must not cost the others
            print(f"{name:34} failed: {error!r}"[:600], flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        rows.append({"case": name, "counted_gib": counted, **row})
        print(
            f"{name:34} {row['held_gib']:8.3f} {counted:9.3f} {row['step_ms']:9.1f} {row['peak_gib']:10.2f}", flush=True
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
