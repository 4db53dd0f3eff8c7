"""Emulated FP8 trains: as FP32 does but for its rounding, and in any layout as in one process.

A sum in another order is off by 1e-7, which now and then tips a value over to the next BF16 (2^-8 away) or E4M3 (2^-3).
Of sixteen runs of six steps (five seeds; EP2, 1F1B and DualPipe with MTP) none came to that in the first two steps, six
did by the sixth, whose loss was then off by up to 1.3e-3. So layouts are compared bit for bit where all sums have one
order, and otherwise by the first step, with later losses within 1e-2.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parity import in_processes, tiny

PP2 = {"world_size": 2, "pipeline": 2}
EP2 = {"world_size": 2, "expert": 2}
STEPS = 3


def emulated(power_of_2: bool = True, **changes):
    return tiny(precision={"fp8": "emulated", "power_of_2_scales": power_of_2}, **changes)


def errors(got: dict, expected: dict) -> dict[str, float]:
    """Each gradient's relative error in the first step."""
    assert got["gradients"].keys() == expected["gradients"].keys()
    return {
        name: float((tensor - expected["gradients"][name]).norm() / expected["gradients"][name].norm())
        for name, tensor in got["gradients"].items()
    }


def assert_close(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got["losses"][0], expected["losses"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["norms"][0], expected["norms"][0], rtol=tolerance, atol=0)
    assert max(errors(got, expected).values()) < tolerance
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-2, atol=0)


def smoothed(result: dict) -> torch.Tensor:
    """Losses, each the mean of ten steps."""
    return torch.tensor([loss for loss, *_ in result["losses"]]).unfold(0, 10, 1).mean(1)


def test_training_tracks_fp32(run):
    """Smoothed losses within 0.5%.

    Seen: 0.05 to 0.31% with five seeds, 0.12% of BF16 alone, 0.64 to 2% of FP32 from other seeds, 11% of E4M3 without
    scales, where gradients vanish.
    """
    options = {
        "optim": {"eps": 1e-8},
        "schedule": {"lr": 1e-3},
        "training": {"micro_batch_size": 8, "duration": "30 steps"},
    }
    exact, got = (smoothed(run(make(**options), steps=30)) for make in (tiny, emulated))
    assert exact[-1] < 0.85 * exact[0]
    off = got / exact - 1
    assert 0 < off.abs().max() < 5e-3, off


@pytest.mark.slow
def test_smoke_tracks_fp32(tmp_path):
    """The smoke recipe's first 100 steps: smoothed losses within 1%, about as far as FP32 from another seed.

    The report's 0.25% is for models of 16B and more. Over all 400 steps it was at most 0.80 and 0.43% with two seeds
    (on average of the last half +0.65 and -0.04%), 0.34% of BF16 alone, and FP32 with one seed 0.74% from the other.
    """
    losses = {}
    for kind in ("none", "emulated"):
        run_dir = tmp_path / kind
        settings = [
            "training.duration=100 steps",
            "training.eval_interval=0",
            f"data.prepare.output={tmp_path / 'data'}",
        ]
        command = [sys.executable, "-m", "dsv3_cli.main", "train", "smoke", f"precision.fp8={kind}", *settings]
        subprocess.run([*command, f"runtime.run_dir={run_dir}"], check=True, capture_output=True)
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        losses[kind] = torch.tensor([line["loss"] for line in lines if line["kind"] == "step"]).unfold(0, 20, 1).mean(1)
    off = losses["emulated"] / losses["none"] - 1
    assert 0 < off.abs().max() < 0.01, off


@pytest.mark.parametrize(("schedule", "sequences"), [("1f1b", 4), ("zb1p", 4), ("dualpipe", 2)])
def test_pipelines_are_bit_equal(run, schedule, sequences):
    """MTP adds up the embedding's gradient of two stages, clipping norms of two ranks, and each direction of DualPipe
    its micro-batches': without the first two, and with one micro-batch a direction, no sum has another order."""
    alike = {
        "model": {"num_nextn_predict_layers": 0},
        "optim": {"clip_grad_norm": 0},
        "schedule": {"batch_size": sequences, "mtp_weight": 0},
    }
    got = run(emulated(**alike, parallel=PP2, pipeline={"schedule": schedule, "layout": "Ettt|tL"}), steps=STEPS)
    expected = run(emulated(**alike), steps=STEPS)
    for what in ("gradients", "weights"):
        assert got[what].keys() == expected[what].keys()
        assert all(torch.equal(tensor, expected[what][name]) for name, tensor in got[what].items())
    assert torch.equal(got["expert_counts"], expected["expert_counts"])
    losses = ([loss for loss, *_ in result["losses"]] for result in (got, expected))
    torch.testing.assert_close(*losses, rtol=1e-7, atol=0)  # averaged by other sums


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe"])
def test_pipelines_with_mtp(run, schedule):
    got = run(emulated(parallel=PP2, pipeline={"schedule": schedule, "layout": "Ettt|tmL"}), steps=STEPS)
    assert_close(got, run(emulated(), steps=STEPS))


@pytest.mark.parametrize("modules", [["layernorm", "mla_up_proj", "moe_act"], ["full"]], ids=["parts", "full"])
def test_recompute(run, modules):
    got = run(emulated(training={"recompute": modules}), steps=STEPS)
    assert_close(got, run(emulated(), steps=STEPS), 1e-6)


def test_expert_parallel(run):
    """An expert sees both ranks' tokens at once, so that other tokens share the scales of its Wgrad.

    Where scales are powers of 2 that changes nothing but for values 2^15 times smaller than their tile's largest:
    E4M3 keeps the same four bits of a value whatever its exponent.
    """
    assert_close(run(emulated(parallel=EP2), steps=STEPS), run(emulated(), steps=STEPS))


def test_expert_parallel_with_fp32_scales(run):
    """FP32 scales move the steps of E4M3 with the tile: experts' gradients are off by what E4M3 rounds (seen: 0.024).

    Against one process that has both sequences in a micro-batch, and so the same tokens in the tiles of experts, they
    are equal, and those of layers that see each sequence are not.
    """
    got = run(emulated(False, parallel=EP2), steps=1)
    apart = errors(got, run(emulated(False), steps=1))
    together = errors(got, run(emulated(False, training={"micro_batch_size": 2}), steps=1))
    experts = {name for name in apart if ".experts." in name and ".shared_experts." not in name}
    assert len(experts) == 8
    for name in apart:
        if name in experts:
            assert 1e-3 < apart[name] < 0.05, name
            assert together[name] < 1e-5, name
        else:
            assert apart[name] < 1e-4, name  # an FP32 sum on the edge of a BF16: seen at 6e-6
    assert together["decoder.layers.0.mlp.linear_fc1.weight"] > 1e-3


def half_layers(out: Path) -> None:
    """One tensor-parallel rank's column- and row-parallel linear, forward and backward."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.local_layers import set_arithmetic
    from dsv3_train.precision.emulated import BlockScaled
    from dsv3_train.runtime import distributed

    recipe = emulated(parallel={"world_size": 2, "tensor": 2})
    distributed.start(recipe, "cpu")
    rank = torch.distributed.get_rank()
    options = {"config": megatron_config(recipe, "cpu"), "init_method": torch.nn.init.zeros_, "bias": False}
    x, up, down, dy = matrices()
    layers = torch.nn.ModuleList(
        [
            ColumnParallelLinear(256, 512, **options),
            RowParallelLinear(512, 128, input_is_parallel=True, skip_bias_add=True, **options),
        ]
    )
    set_arithmetic(layers, BlockScaled(True))
    with torch.no_grad():
        layers[0].weight.copy_(up.chunk(2)[rank])
        layers[1].weight.copy_(down.chunk(2, dim=1)[rank])
    mine = x.chunk(2)[rank].clone().requires_grad_()
    y, _ = layers[1](layers[0](mine)[0])
    y.backward(dy.chunk(2)[rank])
    torch.save([y.detach(), mine.grad, layers[0].weight.grad, layers[1].weight.grad], out / f"{rank}.pt")
    distributed.stop()


def matrices() -> tuple[torch.Tensor, ...]:
    """Input [s, b, in], both weights and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 2, 256), (512, 256), (128, 512), (96, 2, 128)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_tensor_parallel_layers(run, tmp_path):
    """Sequences are gathered before they are quantised, and what ranks add up are their BF16 results."""
    from dsv3_train.model.weight_gradients import linear
    from dsv3_train.precision.emulated import BlockScaled

    in_processes(functools.partial(half_layers, tmp_path), 2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, up, down, dy = (matrix.requires_grad_() for matrix in matrices())
    halves = zip(up.chunk(2), down.chunk(2, dim=1), strict=True)
    total = sum(linear(linear(x, u, BlockScaled(True)), d, BlockScaled(True)) for u, d in halves)
    total.backward(dy.detach())
    assert torch.equal(torch.cat([result[0] for result in results]), total)
    assert torch.equal(torch.cat([result[1] for result in results]), x.grad)
    assert torch.equal(torch.cat([result[2] for result in results]), up.grad)
    assert torch.equal(torch.cat([result[3] for result in results], dim=1), down.grad)
