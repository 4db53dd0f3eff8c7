"""Where two schedules' forward passes first part, bit by bit: of every module's outputs, for every micro-batch.

    python tools/gpu_first_difference.py --gpus 4 pp2_ep2_1f1b pp2_ep2_dualpipe --out DIR
    python tools/gpu_first_difference.py --gpus 4 --cpu pp2_ep2_1f1b pp2_ep2_dualpipe --out DIR

Cases are those of gpu_schedules.py, in a set of processes each. Weights and gradients of the first step are compared
too. A module that runs again in a backward pass does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_schedules import LAYOUTS, SCHEDULES, Case, batches_of, recipe_of
from gpu_sketch import distance, sketch

SECONDS_PER_CASE = 180

Seen = tuple[str, int, int, int, int]
"""A module's global name, the data-parallel rank, the pipeline's direction, the module's call, and which output."""


def checksum(x: Any) -> Any:
    """Two sums of a tensor's bits, and its norm, left on the device: nothing waits, and no copy is made."""
    import torch

    x = x.detach().contiguous()
    bits = x.view(torch.int32 if x.size(-1) * x.element_size() % 4 == 0 else torch.int16)
    columns = bits.reshape(-1, bits.size(-1)).sum(0, dtype=torch.int64)
    places = torch.arange(1, len(columns) + 1, device=x.device)
    norm = torch.linalg.vector_norm(x, dtype=torch.float32)
    return torch.stack([columns.sum().double(), (columns * places % (1 << 50)).sum().double(), norm.double()])


def watch(trainer: Any, into: list[tuple[Seen, Any]]) -> None:
    """Note what modules give in forward passes, in the order in which they run."""
    import torch
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()

    def hook(name: str, direction: int) -> Callable[..., None]:
        calls = itertools.count()

        def note(_module: Any, _arguments: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            call = next(calls)
            for index, x in enumerate(output if isinstance(output, tuple) else (output,)):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 0:
                    into.append(((name, rank, direction, call, index), checksum(x)))

        return note

    for model in trainer.models:
        for name, module in model.named_modules():
            if list(module.children()) and not hasattr(module, "fp8_meta") and not name.endswith("router"):
                continue
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
            module.register_forward_hook(hook(".".join(parts), model.place.direction))


def on_rank(case: Case, options: argparse.Namespace) -> None:
    device, recipe = "cpu" if options.cpu else "cuda", recipe_of(case, options)
    from dsv3_train.runtime import distributed

    distributed.prepare_import(device, recipe)
    import torch

    from dsv3_train.optim.schedules import Schedules
    from dsv3_train.runtime.exchange import exchange
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.step import forward_backward

    distributed.start(recipe, device)
    schedules, trainer = Schedules(recipe), assemble(recipe, device, drawn_on=device)
    mine, count = next(batches_of(trainer, options, device, 1))
    seen: list[tuple[Seen, Any]] = []
    weights = sketch(trainer, device, "data")
    watch(trainer, seen)
    loss = forward_backward(trainer, schedules.at(0), mine, count).loss
    both = len({model.place.direction for model in trainer.models}) == 2
    half = (count + 1) // 2 if both else count
    calls = Counter((name, direction) for name, direction, _ in {(key[0], *key[2:4]) for key, _ in seen})
    outputs = [
        ([name, rank, direction * half + call // each, f"{call % each}.{index}"], sums.tolist())
        for (name, rank, direction, call, index), sums in seen
        for each in [calls[name, direction] // (count - half if direction else half)]
    ]
    told = {"loss": loss, "weights": weights, "outputs": outputs, "gradients": sketch(trainer, device)}
    everyone = exchange(dict[str, Any], told)
    if torch.distributed.get_rank() == 0:
        (options.out / f"{case}.json").write_text(json.dumps(everyone))
    distributed.stop()


def compare(one: list[dict], other: list[dict]) -> None:
    """Print the first outputs that differ, by micro-batch, and how far gradients are apart by parameter."""
    print("losses", one[0]["loss"], other[0]["loss"])
    have = {tuple(key): sums for told in other for key, sums in told["outputs"]}
    for told in one:
        first: dict[tuple[int, int], str] = {}
        both = [(key, sums, have[tuple(key)]) for key, sums in told["outputs"] if tuple(key) in have]
        differing = [entry for entry in both if entry[1][:2] != entry[2][:2]]
        for (name, rank, batch, index), sums, theirs in differing:
            apart = abs(theirs[2] / max(sums[2], 1e-30) - 1)
            first.setdefault((rank, batch), f"{name} [{index}], norms {apart:.1e} apart")
        print(f"{len(differing)} of {len(both)} outputs differ")
        for place, where in sorted(first.items()):
            print("  data-parallel rank, micro-batch", place, where)
    for what in ("weights", "gradients"):
        rows = [{name: row for told in reversed(two) for name, row in told[what].items()} for two in (one, other)]
        print(what, distance(*rows))
    for name, row in rows[0].items():
        if row != rows[1][name]:
            print(f"  {distance({name: row}, {name: rows[1][name]})['all']:.2e} {name}")


def main() -> None:
    from dsv3_train.data.prepare import prepare
    from dsv3_train.runtime.launch import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE", help="the first is what the others are compared with")
    parser.add_argument("--gpus", type=int, choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_schedules"), help="data")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    known = {str(case): case for case in (Case(*at, name) for at in LAYOUTS[options.gpus] for name in SCHEDULES)}
    unknown = [name for name in options.cases if name not in known]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(known)}")
    prepare(recipe_of(known[options.cases[0]], options).data.prepare)
    for name in options.cases:
        process = multiprocessing.get_context("fork").Process(
            target=launch, args=(lambda name=name: on_rank(known[name], options), options.gpus, "cpu")
        )
        process.start()
        process.join(SECONDS_PER_CASE)
        if process.is_alive():
            process.kill()  # its ranks die with it
            raise SystemExit(f"{name}: not done after {SECONDS_PER_CASE} s")
    told = [json.loads((options.out / f"{name}.json").read_text()) for name in options.cases]
    for other in told[1:]:
        compare(told[0], other)


if __name__ == "__main__":
    main()
