"""Runs that stop and go on: bit for bit in the same layout, and with the same loss in another."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_train.data.prepare import prepare
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Prepare
from dsv3_train.runtime import distributed
from parity import in_processes, tiny

STEPS, CUT = 40, 17


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Words, the same ones everywhere: on other text a token near a tie of two experts may go to the other in another
    layout, which moves a loss by some 1e-5."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(2000)]
    for number in range(200):
        text = " ".join(words[min(int(draw.paretovariate(0.7)), 2000) - 1] for _ in range(draw.randint(200, 2000)))
        (folder / f"{number}.txt").write_text(text)
    prefix = str(folder / "words")
    prepare(Prepare(inputs=[str(folder)], output=prefix, vocab_size=512, fim_rate=0.1), workers=1)
    distributed.prepare_import("cpu")
    import dsv3_train.training.run  # noqa: F401  once, before forking

    return prefix


def recipe(data: str, run_dir: Path, **changes):
    """40 steps whose batch grows from 8 to 16 over the first 30, the cut at 17 within."""
    base = {
        "model": {"vocab_size": 512},
        "data": {"train": [{"path": data}], "valid_fraction": 0.1, "workers": 0},
        "optim": {"eps": 1e-3, "ema_decay": 0.9},
        "schedule": {
            "lr": [{"linear": [0, 5e-3], "until": "10 steps"}, {"cosine": [5e-3, 5e-4]}],
            "batch_size": [{"linear": [8, 16], "until": "30 steps"}, {"constant": 16}],
            "mtp_weight": [{"constant": 0.3, "until": "25 steps"}, {"constant": 0.1}],
            "bias_update_speed": [{"constant": 1e-3, "until": "35 steps"}, {"constant": 0}],
        },
        "training": {
            "duration": f"{STEPS} steps",
            "micro_batch_size": 4,  # few passes: most of a step's time on a CPU
            "eval_interval": STEPS,
            "eval_sequences": 8,
        },
        "checkpoint": {"interval": 0},
        "logging": {"tensorboard": False, "expert_load_interval": 0},
        "runtime": {"run_dir": str(run_dir)},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return tiny(**base)


def run(settings, stop_after: int | None = None) -> dict[int, dict]:
    """Train in the recipe's run directory; the step records that are there afterwards."""

    def on_rank() -> None:
        from dsv3_train.training.run import Run
        from dsv3_train.training.startup import Startup

        distributed.start(settings, "cpu")
        Run(settings, run_dir, "cpu", Startup()).train(stop_after)
        distributed.stop()

    run_dir = Path(settings.runtime.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    in_processes(on_rank, settings.parallel.world_size)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "validation"]) == (stop_after is None)
    return {line["step"]: line for line in lines if line["kind"] == "step"}


TIMES = ("step_seconds", "breakdown", "tokens_per_second", "memory_gib")


def facts(records: dict[int, dict]) -> dict[int, dict]:
    """All of the records but what depends on the clock."""
    return {step: {k: v for k, v in line.items() if k not in TIMES} for step, line in records.items()}


def tensors(run_dir: Path, step: int) -> dict:
    """Every tensor of a checkpoint: weights, optimizer, averages."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    reader = FileSystemReader(str(run_dir / "checkpoints" / f"step_{step:08d}"))
    loaded = _load_state_dict_from_keys(checkpoint_id=None, storage_reader=reader)
    flat = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    walk(loaded, "")
    return flat


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")
@pytest.mark.parametrize("zero1", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "zero1"])
def test_same_layout_bit_for_bit(data, tmp_path, zero1):
    """Losses, norms, expert loads of every step and every tensor of the last checkpoint."""
    parallel = {"zero1": zero1}
    whole = run(recipe(data, tmp_path / "whole", parallel=parallel))
    assert [whole[step]["batch_size"] for step in (1, CUT, CUT + 1, STEPS)] == [8, 12, 12, 16]
    cut = recipe(data, tmp_path / "cut", parallel=parallel)
    assert list(run(cut, stop_after=CUT)) == list(range(1, CUT + 1))
    assert facts(run(cut)) == facts(whole)
    expected, got = tensors(tmp_path / "whole", STEPS), tensors(tmp_path / "cut", STEPS)
    assert expected.keys() == got.keys()
    assert any("exp_avg_sq" in name for name in got)
    assert any(".ema." in name or name.startswith(".ema") for name in got)
    assert any("expert_bias" in name for name in got)
    assert [name for name in expected if not expected[name].equal(got[name])] == []


# (parallel, pipeline, micro-batch): each takes four sequences at a time, so that the growing batch is rounded alike.
LAYOUTS = {
    "ep2": ({"world_size": 2, "expert": 2}, {}, 2),
    "pp2": ({"world_size": 2, "pipeline": 2}, {"layout": "Ettt|tmL"}, 4),
    "pp2_ep2": ({"world_size": 4, "pipeline": 2, "expert": 2}, {"layout": "Ett|ttmL"}, 2),
}


@pytest.mark.parametrize(
    ("begun", "resumed"),
    [("pp2_ep2", "ep2"), *(pytest.param(*both, marks=pytest.mark.slow) for both in (("ep2", "pp2"), ("pp2", "ep2")))],
)
def test_another_layout(data, tmp_path, begun, resumed):
    """From one EP and PP to another under ZeRO-1, in mid ramp: the same loss at every step within 1e-5."""

    def layout(name: str, run_dir: Path):
        parallel, pipeline, size = LAYOUTS[name]
        training = {"duration": "24 steps", "micro_batch_size": size, "eval_interval": 24}
        schedule = {"bias_update_speed": 1e-3, "mtp_weight": 0.3}
        return recipe(
            data, run_dir, parallel={**parallel, "zero1": True}, pipeline=pipeline, training=training, schedule=schedule
        )

    whole = run(layout(begun, tmp_path / "whole"))
    run(layout(begun, tmp_path / "moved"), stop_after=CUT)
    moved = run(layout(resumed, tmp_path / "moved"))
    assert [moved[step]["batch_size"] for step in moved] == [whole[step]["batch_size"] for step in whole]
    for step in whole:
        assert moved[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5), step


# Two ranks of a pipeline: 1F1B, and both forms of DualPipe, uneven; then one process.
JOURNEY = {
    "1f1b": {"schedule": "1f1b", "layout": "Ettt|tmL"},
    "dualpipe": {"schedule": "dualpipe", "layout": "Ettt|tmL"},
    "dualpipev": {"schedule": "dualpipev", "layout": "Et|tt|t|mL"},
    "one process": {},
}


def on_the_way(data: str, run_dir: Path, name: str, steps: int = 16):
    """The recipe of one leg of the journey."""
    parallel = {"world_size": 2, "pipeline": 2} if JOURNEY[name] else {}
    return recipe(
        data,
        run_dir,
        parallel={**parallel, "zero1": True},
        pipeline=JOURNEY[name],
        training={"duration": f"{steps} steps", "micro_batch_size": 2, "eval_interval": steps},
        schedule={"bias_update_speed": 1e-3, "mtp_weight": 0.3},
    )


def test_from_schedule_to_schedule(data, tmp_path):
    """1F1B -> DualPipe -> DualPipeV -> one process by checkpoints, in mid ramp: as if nothing had happened."""
    whole = run(on_the_way(data, tmp_path / "whole", "one process"))
    for stop, name in enumerate(JOURNEY, start=1):
        moved = run(on_the_way(data, tmp_path / "moved", name), stop_after=4 * stop if stop < len(JOURNEY) else None)
    assert [moved[step]["batch_size"] for step in moved] == [whole[step]["batch_size"] for step in whole]
    for step in whole:
        for what in ("loss", "mtp_loss", "grad_norm"):
            assert moved[step][what] == pytest.approx(whole[step][what], rel=1e-5), (step, what)


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_a_schedule_goes_on_bit_for_bit(data, tmp_path, schedule):
    """Stopped in the middle and resumed: every record, and every tensor of the last checkpoint."""
    whole = run(on_the_way(data, tmp_path / "whole", schedule, steps=8))
    cut = on_the_way(data, tmp_path / "cut", schedule, steps=8)
    run(cut, stop_after=3)
    assert facts(run(cut)) == facts(whole)
    expected, got = tensors(tmp_path / "whole", 8), tensors(tmp_path / "cut", 8)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not expected[name].equal(got[name])] == []


def test_end_in_a_layout_that_rounds_batches_otherwise(data, tmp_path):
    """Steps count on, and what is scheduled by them, to the end at the last, where it validates."""
    short = {"training": {"duration": "20 steps", "micro_batch_size": 2, "eval_interval": 20}}
    short["schedule"] = {"bias_update_speed": 1e-3, "mtp_weight": 0.3}
    run(recipe(data, tmp_path, parallel={"zero1": True}, **short), stop_after=CUT)
    records = run(recipe(data, tmp_path, parallel={"world_size": 2, "expert": 2, "zero1": True}, **short))
    assert all(records[step]["batch_size"] % 4 == 0 for step in records if step > CUT)
    assert sorted(records) == list(range(1, 21))
    tokens = [records[step]["consumed_tokens"] for step in sorted(records)]
    assert tokens == sorted(set(tokens))


def test_another_batch_size_does_not_move_the_steps(data, tmp_path):
    """Six steps of 8, then two of 32: in this recipe's own plan they were one and a half. The samples suffice."""
    settings = {"training": {"duration": "8 steps", "eval_interval": 0}}
    settings["schedule"] = {"bias_update_speed": 1e-3, "mtp_weight": 0.3, "batch_size": 8}
    parallel = {"zero1": True}
    run(recipe(data, tmp_path / "run", parallel=parallel, **settings), stop_after=6)
    settings["schedule"]["batch_size"] = 32
    records = run(recipe(data, tmp_path / "run", parallel=parallel, **settings), stop_after=9)
    assert [records[step]["consumed_samples"] for step in sorted(records)] == [8, 16, 24, 32, 40, 48, 80, 112]
    assert [records[step]["batch_size"] for step in (6, 7)] == [8, 32]
    rates = [records[step]["lr"] for step in sorted(records)]
    assert rates == pytest.approx([5e-4 * step for step in range(8)])
    assert "would have taken 2 steps to 48 samples; steps count on from 6" in (tmp_path / "run" / "log.txt").read_text()
    # And the other way round: more samples than this recipe's own plan has.
    settings["schedule"]["batch_size"] = 4
    settings["training"]["duration"] = "12 steps"
    records = run(recipe(data, tmp_path / "run", parallel=parallel, **settings), stop_after=13)
    assert records[12]["consumed_samples"] == 128


def test_settings_of_the_optimizer_are_the_recipes(data, tmp_path):
    """On a resume too: what a checkpoint has is what they were."""
    settings = {"training": {"duration": "2 steps", "eval_interval": 0}}
    settings["schedule"] = {"bias_update_speed": 1e-3, "mtp_weight": 0.3, "batch_size": 8}
    run(recipe(data, tmp_path / "run", **settings), stop_after=1)
    changed = recipe(data, tmp_path / "run", optim={"beta1": 0.5, "beta2": 0.6, "eps": 1e-4}, **settings)
    seen = tmp_path / "seen"

    def on_rank() -> None:
        from dsv3_train.training.run import Run
        from dsv3_train.training.startup import Startup

        distributed.start(changed, "cpu")
        groups = Run(changed, tmp_path / "run", "cpu", Startup()).trainer.optimizer.param_groups
        seen.write_text(json.dumps([(*group["betas"], group["eps"]) for group in groups]))
        distributed.stop()

    in_processes(on_rank, 1)
    found = json.loads(seen.read_text())
    assert found == [[0.5, 0.6, 1e-4]] * len(found)
    assert found


def test_a_checkpoint_of_ones_own_choice_is_verified(data, tmp_path):
    """And one of sequences of another length refused: samples and schedules count in them."""
    settings = {"training": {"duration": "2 steps", "eval_interval": 0}}
    settings["schedule"] = {"bias_update_speed": 1e-3, "mtp_weight": 0.3, "batch_size": 8}
    settings["parallel"] = {"world_size": 2, "expert": 2}
    run(recipe(data, tmp_path / "run", **settings), stop_after=1)
    begin = {"load": str(tmp_path / "run"), "interval": 0}
    settings["training"]["sequence_length"] = 16
    with pytest.raises(UserError, match=r"sequences of 256 tokens.*set training.sequence_length=32, not 16"):
        run(recipe(data, tmp_path / "other", checkpoint=begin, **settings), stop_after=2)
    del settings["training"]["sequence_length"]
    piece = max((tmp_path / "run" / "checkpoints" / "step_00000001").glob("*.distcp"), key=lambda x: x.stat().st_size)
    whole = bytearray(piece.read_bytes())
    whole[len(whole) // 2] ^= 1
    piece.write_bytes(whole)
    with pytest.raises(UserError, match=rf"step_00000001: the checkpoint is damaged \({piece.name}: its SHA-256"):
        run(recipe(data, tmp_path / "other", checkpoint=begin, **settings), stop_after=2)


def test_a_last_checkpoint_that_cannot_be_written(data, tmp_path, monkeypatch):
    """The run does not end as if all was well; what passes is waited for."""
    from dsv3_train.training import run as running

    monkeypatch.setattr(running, "_WAITS", (0, 0))
    settings = recipe(data, tmp_path / "run", parallel={"world_size": 2, "expert": 2})
    in_the_way = tmp_path / "run" / "checkpoints" / "step_00000001.unfinished"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(UserError, match=r"run/checkpoints: the run is at its end, and its last checkpoint could not"):
        run(settings, stop_after=1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the checkpoint of step 1 failed") == 3

    def waited(seconds: float) -> None:
        if in_the_way.is_file():  # not yet the directory of a rank that waited for less long
            in_the_way.unlink(missing_ok=True)

    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=waited))
    run(settings, stop_after=1)
    assert (tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").is_file()


def test_all_the_time_that_training_stands_still_is_told(data, tmp_path):
    """Also that in which the state is put together; not that of the writer."""
    settings = recipe(data, tmp_path / "run")

    def on_rank() -> None:
        from dsv3_train.checkpoint import save
        from dsv3_train.training import run as running
        from dsv3_train.training.startup import Startup

        state, write = running.training_state, save._write

        def slow_state(*arguments, **options):
            time.sleep(0.5)
            return state(*arguments, **options)

        def slow_write(*arguments):
            time.sleep(3)
            return write(*arguments)

        running.training_state, save._write = slow_state, slow_write
        distributed.start(settings, "cpu")
        one = running.Run(settings, tmp_path / "run", "cpu", Startup())
        one._save()
        while one.writer._save is not None:
            time.sleep(0.05)  # training
            one.writer.poll()
        distributed.stop()

    in_processes(on_rank, 1)
    (line,) = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "stood still" in line]
    assert 0.5 < float(line.split("for ")[1].split(" s")[0]) < 3


def test_a_stop_whose_checkpoint_cannot_be_written(data, tmp_path, capfd):
    """It does not pass for saved: the code is that of a failure, which a cluster starts again."""
    settings = recipe(data, tmp_path / "run", parallel={"world_size": 2, "expert": 2})
    in_the_way = tmp_path / "run" / "checkpoints" / "step_00000001.unfinished"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()

    def on_rank() -> None:
        from dsv3_train.training.run import Run
        from dsv3_train.training.startup import Startup

        distributed.start(settings, "cpu")
        Run(settings, tmp_path / "run", "cpu", Startup(), stop=SimpleNamespace(name="SIGTERM")).train()

    with pytest.raises(SystemExit) as ended:
        in_processes(on_rank, 2)
    assert ended.value.code == 1
    assert "step 1 could not be saved" in (tmp_path / "run" / "log.txt").read_text()
