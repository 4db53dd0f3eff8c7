"""Batches that give NaN or a spike, replicas that differ, disks that are full: in training runs of two processes."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv3_train.data import index
from dsv3_train.data.prepare import prepare
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare, Recipe
from dsv3_train.runtime import distributed, incidents
from dsv3_train.runtime.exits import CORRUPT
from dsv3_train.runtime.launch import launch
from parity import tiny

STEPS = 24
NAN_LOSS, NAN_GRADIENT, SPIKE = 10, 13, 19


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    prefix = str(tmp_path_factory.mktemp("data") / "own")
    sources = str(Path(__file__).parents[1] / "dsv3_train" / "recipe")
    prepare(Prepare(inputs=[sources], output=prefix, vocab_size=512, fim_rate=0.1), workers=1)
    distributed.prepare_import("cpu")
    import dsv3_train.training.run  # noqa: F401  once, before forking

    return prefix


def recipe(data: str, run_dir: Path, **faults) -> Recipe:
    """24 steps on two data-parallel ranks, a checkpoint every 4."""
    return tiny(
        model={"vocab_size": 512},
        parallel={"world_size": 2, "expert": 2, "zero1": True},
        data={"train": [{"path": data}], "valid_fraction": 0.1, "workers": 1},
        training={"duration": f"{STEPS} steps", "micro_batch_size": 4},
        checkpoint={"interval": 4, "keep_last": 3},
        faults={"spike": 15.0, "spike_window": 16, "spike_batches": 2, **faults},
        logging={"tensorboard": False, "expert_load_interval": 0},
        runtime={"run_dir": str(run_dir), "deterministic": True},
    )


def run(settings: Recipe, before: Callable[[], None] = lambda: None) -> dict[int, dict]:
    """Train; the lines of metrics.jsonl by step. `before` is called in each process."""
    run_dir = Path(settings.runtime.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    def on_rank() -> None:
        from dsv3_train.training.run import Run
        from dsv3_train.training.startup import Startup

        distributed.start(settings, "cpu")
        before()
        Run(settings, run_dir, "cpu", Startup()).train()
        distributed.stop()

    launch(on_rank, 2, "cpu")
    return metrics(run_dir)


def metrics(run_dir: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def inject() -> None:
    """Wrong numbers at three steps; a step counts from the run's position."""
    from megatron.core import parallel_state

    from dsv3_train.training import run as loop

    plain = loop.forward_backward

    def wrong(trainer, values, batches, count):
        losses = plain(trainer, values, batches, count)
        step = round(values.lr * 1e6)
        if step == NAN_GRADIENT and parallel_state.get_data_parallel_rank() == 1:
            trainer.chunks[0].buffers[0].grad_data[7] = math.inf
        changes = {NAN_LOSS: float("nan"), SPIKE: losses.loss + 30}
        return dataclasses.replace(losses, loss=changes[step]) if step in changes else losses

    loop.forward_backward = wrong


def losses(records: dict[int, dict]) -> dict[int, float | None]:
    return {step: line.get("loss") for step, line in records.items()}


def sums(run_dir: Path) -> dict:
    newest = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json"
    known = json.loads(newest.read_text())["sha256"]
    return {name: entry for name, entry in known.items() if name.endswith(".distcp")}


def numbered(settings: Recipe) -> Recipe:
    """With a learning rate that tells the step: step x 1e-6."""
    ramp = [{"linear": [1e-6, (STEPS + 1) * 1e-6]}]
    schedule = settings.schedule.model_validate({**settings.schedule.model_dump(), "lr": ramp})
    return settings.model_copy(update={"schedule": schedule})


def test_bad_batches_equal_a_run_that_is_told_to_skip_them(data, tmp_path):
    """NaN loss, an infinite gradient on one rank, a spike: found, recorded, and without a trace in the numbers."""
    found = run(numbered(recipe(data, tmp_path / "found", rerun_interval=5)), inject)  # the NaN loss twice
    skips = [json.loads(line) for line in (tmp_path / "found" / "skips.jsonl").read_text().splitlines()]
    assert [(skip["reason"], skip["step"]) for skip in skips] == [
        ("not finite", NAN_LOSS),
        ("not finite", NAN_GRADIENT),
        ("spike", SPIKE),
    ]
    ranges = [f"{skip['first']}-{skip['last']}" for skip in skips]
    assert ranges == ["72-79", "96-103", "136-151"]
    passed_over = [step for step, line in found.items() if line["kind"] == "passed over"]
    assert passed_over == [NAN_LOSS, NAN_GRADIENT, SPIKE - 1, SPIKE]
    text = (tmp_path / "found" / "log.txt").read_text()
    assert "step 10: loss is nan; passed over, samples 72-79" in text
    assert f"step {SPIKE}: loss" in text
    assert "resumed from" in text.split("is a spike")[1]
    assert [incident["kind"] for incident in incidents.read(tmp_path / "found")] == ["not finite"] * 2 + ["spike"]
    told = run(numbered(recipe(data, tmp_path / "told", skip_samples=ranges)))
    assert losses(found) == losses(told)
    assert sums(tmp_path / "found") == sums(tmp_path / "told")


@pytest.mark.parametrize("zero1", [False, True])
def test_a_checkpoint_before_the_first_update(data, tmp_path, zero1):
    """The first step is passed over: Adam has no moments when it is saved, and at the next save it has."""
    four = recipe(data, tmp_path, skip_samples=["0-7"]).model_dump(exclude_unset=True)
    four["parallel"] |= {"zero1": zero1}
    four["training"] |= {"duration": "4 steps"}
    four["checkpoint"] = {"interval": 1, "keep_last": 4}
    expected = losses(run(Recipe.model_validate(four)))
    assert len(expected) == 4
    assert expected[1] is None
    begin = 1 if zero1 else 2
    for step in range(begin + 1, 5):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    assert losses(run(Recipe.model_validate(four))) == expected
    assert f"step_{begin:08d} at step {begin}" in (tmp_path / "log.txt").read_text().split("resumed from")[-1]


def test_too_many_in_a_row_end_the_run(data, tmp_path):
    def all_wrong() -> None:
        from dsv3_train.training import run as loop

        plain = loop.forward_backward
        loop.forward_backward = lambda *arguments: dataclasses.replace(plain(*arguments), loss=math.nan)

    with pytest.raises(UserError, match=r"step 3: loss is nan, as in the 2 .*faults\.max_unusable.*schedule\.lr"):
        run(recipe(data, tmp_path, max_unusable=3), all_wrong)


def test_a_disk_that_takes_no_more(data, tmp_path):
    """From the second start on nothing large can be written: training goes on, older checkpoints stay, all is told.

    At its end the run fails, as its last checkpoint does at a second attempt.
    """

    def full() -> None:
        from dsv3_train.training import run as loop

        loop._WAITS = (0,)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    short = recipe(data, tmp_path).model_dump(exclude_unset=True)
    run(Recipe.model_validate({**short, "training": {**short["training"], "duration": "4 steps"}}))
    with pytest.raises(UserError, match="the run is at its end, and its last checkpoint could not be written"):
        run(recipe(data, tmp_path), full)
    assert sorted(metrics(tmp_path)) == list(range(1, STEPS + 1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    told = [incident["text"] for incident in incidents.read(tmp_path)]
    assert len(told) == 6
    assert told[0].startswith(
        "the checkpoint of step 8 failed, and training goes on: rank 0: [Errno 27] File too large"
    )


def test_corruption_is_found_and_the_rank_named(data, tmp_path, capfd):
    def flip_a_weight() -> None:
        """Of a norm, after the second step on rank 1, as a broken memory would."""
        import torch

        from dsv3_train.training import guard

        plain = guard.compare_replicas

        def flipped(trainer):
            if torch.distributed.get_rank() == 1:
                weight = dict(trainer.models[0].named_parameters())["decoder.final_layernorm.weight"]
                weight.data.view(torch.int32)[3] ^= 1 << 12
            return plain(trainer)

        guard.compare_replicas = flipped

    with pytest.raises(SystemExit) as stop:
        run(recipe(data, tmp_path / "replicas", compare_interval=2), flip_a_weight)
    assert stop.value.code == CORRUPT
    (incident,) = incidents.read(tmp_path / "replicas")
    assert incident["text"].startswith("step 2: rank 0 on ")  # of two that differ nobody knows which is right
    assert "has other bits than its replicas in decoder.final_layernorm.weight" in incident["text"]

    def wrong_once() -> None:
        """On rank 1 a gradient comes out with one other bit the second time."""
        import torch

        from dsv3_train.training import guard

        class Wrong(guard.Rerun):
            def compare(self, first):
                if torch.distributed.get_rank() == 1:
                    again = self.compute

                    def compute():
                        losses = again()
                        self.trainer.chunks[0].buffers[0].grad_data.view(torch.int32)[5] ^= 1
                        return losses

                    self.compute = compute
                return super().compare(first)

        guard.Rerun = Wrong

    assert len(run(recipe(data, tmp_path / "right", rerun_interval=3, compare_interval=5))) == STEPS
    with pytest.raises(SystemExit) as stop:
        run(recipe(data, tmp_path / "rerun", rerun_interval=3), wrong_once)
    assert stop.value.code == CORRUPT
    (incident,) = incidents.read(tmp_path / "rerun")
    assert incident["text"].startswith("step 3: rank 1 on ")
    assert "computed the same step twice, with different bits" in incident["text"]


def test_a_token_outside_the_vocabulary_costs_its_batch(data, tmp_path):
    """Of data without a manifest: as if the recipe passed over the batch; a validation that meets it is left out."""
    tokens = np.random.RandomState(0).randint(0, 500, 3600).astype(np.uint16)

    def of(name: str, token: int, **faults) -> Recipe:
        prefix = str(tmp_path / name)
        tokens[[40 * 40 + 7, 40 * 85 + 7]] = token
        tokens.tofile(f"{prefix}.bin")
        index.write(Path(f"{prefix}.idx"), np.dtype(np.uint16), np.full(90, 40, np.int32))
        settings = recipe(prefix, tmp_path / f"run_{name}", **faults)
        changes = {"duration": "12 steps", "eval_interval": 10, "eval_sequences": 40}
        training = settings.training.model_validate({**settings.training.model_dump(), **changes})
        return settings.model_copy(update={"training": training})

    def trained(name: str) -> list[tuple[int, float | None]]:
        lines = map(json.loads, (tmp_path / f"run_{name}" / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line.get("loss")) for line in lines if line["kind"] in ("step", "passed over")]

    run(of("wrong", 600))
    (skip,) = [json.loads(line) for line in (tmp_path / "run_wrong" / "skips.jsonl").read_text().splitlines()]
    assert skip["reason"] == "token"
    samples = f"{skip['first']}-{skip['last']}"
    told = [incident["text"] for incident in incidents.read(tmp_path / "run_wrong")]
    validations = [line for line in told if line.startswith("no validation at step ")]
    assert [line.split(":")[0] for line in validations] == ["no validation at step 10", "no validation at step 12"]
    assert "of document 85 of" in validations[0]
    (batch,) = [line for line in told if line not in validations]
    assert batch.startswith(f"step {skip['step']}: sample ")
    where = f"holds token 600, of document 40 of {tmp_path / 'wrong'}, but model.vocab_size is 512"
    assert batch.endswith(f"{where}; passed over, samples {samples}")

    run(of("sound", 1, skip_samples=[samples]))
    assert trained("wrong") == trained("sound")
    assert len(trained("wrong")) == 12
