"""The unit of work, ours beside Megatron-core's own, in one process: wall, GPU and host time, kernels, bytes held.

    python tools/bench_unit.py [--repeats 8] [--out FILE.json]

One GPU stands for a rank of EP64 (tools/activation_bytes.py): 4096 tokens, 256 experts of which it has 4, even routing,
forward and backward, one copy in place of each all-to-all. The cases are four MoE layers of the middle of the model,
the first stage (embedding, 3 dense layers, 1 MoE layer) and the last (embedding, 1 MoE layer, MTP, head over 129280
words). Megatron-core has the configuration of ours and Transformer Engine's fused kernels. Cases take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activation_bytes import ALL, recipe_of, stand_in_for_peers

GIB = 2**30
FP8 = {"fp8": "blockwise"}
PAPER = {**FP8, "swiglu_input": "fp8", "attention_output": "e5m6", "fp8_dispatch": "true"}
Case = tuple[str, str, bool, list[str], dict[str, str]]
"""Name, part of the model, ours, what is recomputed, precision."""
CASES: list[Case] = [
    ("Megatron-core FP8", "middle", False, [], FP8),
    ("ours FP8", "middle", True, [], FP8),
    ("Megatron-core FP8, recompute", "middle", False, ALL, FP8),
    ("ours, the paper's options", "middle", True, ALL, PAPER),
    ("Megatron-core FP8, first stage", "first", False, [], FP8),
    ("ours FP8, first stage", "first", True, [], FP8),
    ("Megatron-core FP8, last stage", "last", False, [], FP8),
    ("ours FP8, last stage", "last", True, [], FP8),
]
PARTS = {"first": (4, 3, 0), "middle": (4, 0, 0), "last": (1, 0, 1)}
"""Layers, dense ones among them, depth of MTP."""


def recipe_for(part: str, recompute: list[str], precision: dict[str, str]) -> Any:
    from dsv3_train.recipe.load import load
    from dsv3_train.recipe.schema import NO_FP8

    layers, dense, mtp = PARTS[part]
    return load(
        "dsv3_671b_2048xh800",
        [
            "parallel={world_size: 64, expert: 64}",
            "pipeline={schedule: 1f1b}",
            f"model.num_hidden_layers={layers}",
            f"model.first_k_dense_replace={dense}",
            f"model.num_nextn_predict_layers={mtp}",
            *([] if mtp else ["schedule.mtp_weight=0"]),
            f"training.recompute=[{', '.join(recompute)}]",
            "data.train=[{path: unused}]",
            *NO_FP8,
            *(f"precision.{key}={value}" for key, value in precision.items()),
        ],
    )


def megatrons_own(config: Any, recipe: Any, first: bool, last: bool) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    config.moe_router_padding_for_quantization = True
    config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = True, "te"
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True) if config.mtp_num_layers else None
    return GPTModel(
        config,
        spec,
        vocab_size=recipe.model.vocab_size,
        max_sequence_length=4096,
        position_embedding_type="rope",
        pre_process=first,
        post_process=last,
        mtp_block_spec=mtp,
        share_embeddings_and_output_weights=False,
    ).cuda()


def made(part: str, ours: bool, recompute: list[str], precision: dict[str, str]) -> tuple[Callable, list[int]]:
    """A forward and backward pass of a case, and the bytes that each call finds held between the two."""
    from dsv3_train.model.build import build_stage, in_training_precision
    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.stage import Place

    recipe = recipe_for(part, recompute, precision)
    config = megatron_config(recipe, "cuda")
    config.moe_router_force_load_balancing = True
    config.mtp_loss_scaling_factor = 0.3
    first, last = part in ("first", "last"), part == "last"  # MTP embeds, so the last stage has an embedding too
    if ours:
        stage, stages = {"first": (0, 3), "middle": (1, 3), "last": (0, 1)}[part]
        chunk = build_stage(recipe, config, Place(0, stage, stages, None, mirrored=False, replica=False))
    else:
        chunk = megatrons_own(config, recipe, first, last)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.006)
    model = in_training_precision(chunk, config) if ours else chunk.bfloat16()
    hidden = recipe.model.hidden_size
    x = None if first else torch.randn(4096, 1, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(4096, 1, hidden, device="cuda", dtype=torch.bfloat16)
    places = torch.arange(4096, device="cuda")[None]
    tokens = torch.randint(0, 129000, (1, 4096), device="cuda")
    held: list[int] = []

    def step() -> None:
        before = torch.cuda.memory_allocated()
        if x is not None:
            chunk.set_input_tensor(x)
        y = model(tokens if first or not ours else None, places, None, labels=tokens if last else None)
        held.append(torch.cuda.memory_allocated() - before)
        if last:
            y.float().mean().backward()
        else:
            y.backward(gradient)
        for parameter in model.parameters():
            parameter.grad = None
        if x is not None:
            x.grad = None

    return step, held


def busy(step: Callable[[], None]) -> tuple[float, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return sum(e.self_device_time_total for e in events) / 1e3, sum(e.count for e in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write the table here as JSON too")
    arguments = parser.parse_args()
    from dsv3_train.runtime import distributed

    torch.cuda.set_device(0)
    start = recipe_of(4, [], {})
    distributed.prepare_import("cuda", start)
    distributed.pretend(start, 0)
    stand_in_for_peers()
    from dsv3_train.model import operators

    rows = []
    print(f"{torch.cuda.get_device_name()}: least and median wall ms, GPU ms, host ms, kernels, GiB held", flush=True)
    for part in arguments.parts:
        steps: dict[str, tuple[Callable, bool, list[int]]] = {}
        for name, of, ours, recompute, precision in CASES:
            if of != part:
                continue
            try:
                (operators.install if ours else operators.uninstall)()
                step, held = made(part, ours, recompute, precision)
                for _ in range(3):
                    step()
                steps[name] = (step, ours, held)
            except Exception as error:  # a case must not cost the others
                print(f"{name:34} failed: {error!r}"[:800], flush=True)
        wall: dict[str, list[float]] = {name: [] for name in steps}
        host: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.repeats):
            for name, (step, ours, _) in steps.items():
                (operators.install if ours else operators.uninstall)()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                step()
                host[name].append(1e3 * (time.perf_counter() - begin))
                torch.cuda.synchronize()
                wall[name].append(1e3 * (time.perf_counter() - begin))
        for name, (step, ours, held) in steps.items():
            (operators.install if ours else operators.uninstall)()
            gpu, kernels = busy(step)
            row = {
                "case": name,
                "wall": min(wall[name]),
                "median": statistics.median(wall[name]),
                "gpu": gpu,
                "host": min(host[name]),
                "kernels": kernels,
                "held": held[-1] / GIB,
            }
            rows.append(row)
            times = (
                f"{row['wall']:7.1f} {row['median']:7.1f} {gpu:7.1f} {row['host']:7.1f} {kernels:6d} {row['held']:6.2f}"
            )
            print(f"{name:34} {times}", flush=True)
        del steps, step
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
