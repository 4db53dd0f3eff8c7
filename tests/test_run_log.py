"""What a run leaves behind: each step once whatever was cut off, and pictures that show what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3_train.recipe.load import load
from dsv3_train.training import losses, pictures
from dsv3_train.training.log import RunLog
from dsv3_train.training.record import StepRecord
from dsv3_train.training.speed import peak_bf16_tflops

TOTAL = 10


def record(step: int, **changes) -> StepRecord:
    known = StepRecord(
        step=step,
        total_steps=TOTAL,
        consumed_samples=4 * step,
        consumed_tokens=512 * step,
        loss=8.0 / step,
        mtp_loss=9.0 / step,
        balance_loss=1.0,
        lr=1e-3,
        batch_size=4,
        mtp_weight=0.3,
        bias_update_speed=1e-3,
        grad_norm=1.5,
        step_seconds=0.5,
        breakdown={"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1},
        tokens_per_second=1024.0,
        load_max_over_mean=[1.5, 2.0],
        bias_spread=[0.001, 0.002],
        memory_gib=0.25,
    )
    return replace(known, **changes)


def open_log(run_dir, resumed_step: int = 0, *overrides: str) -> RunLog:
    return RunLog(run_dir, load("smoke", overrides), total_steps=TOTAL, resumed_step=resumed_step)


def metrics(run_dir) -> list[dict]:
    def strict(constant: str):
        raise ValueError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=strict) for line in lines]


@pytest.fixture
def resumed(tmp_path):
    """Steps 1-5, killed in the middle of a line; resumed from step 3 with another loss, to the end."""
    first = open_log(tmp_path)
    for step in range(1, 6):
        first.step(record(step))
        if step in (2, 4):
            first.validation(step, 512 * step, 5.0)
    first._metrics.add('{"kind": "step", "st')
    first._metrics.close()
    first._board.close()
    first._progress.stop()
    again = open_log(tmp_path, 3)
    for step in range(4, TOTAL + 1):
        again.step(record(step, loss=1.0))
    again.validation(TOTAL, 512 * TOTAL, 4.0)
    again.close()
    return tmp_path


def test_metrics_hold_each_step_once(resumed):
    lines = metrics(resumed)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, TOTAL + 1))
    assert [line["loss"] for line in steps[2:5]] == [8.0 / 3, 1.0, 1.0]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, TOTAL]
    assert steps[0]["breakdown"] == {"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1}


def test_tensorboard_holds_each_step_once(resumed):
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/main")] == list(range(1, TOTAL + 1))
    assert events.Scalars("loss/main")[3].value == 1.0
    assert set(events.Tags()["scalars"]) == {
        "loss/main",
        "loss/mtp",
        "loss/balance",
        "schedule/lr",
        "schedule/batch size",
        "schedule/mtp weight",
        "schedule/bias update speed",
        "grad norm",
        "consumed tokens",
        "speed/tokens per second",
        "memory/GiB",
        "time/data",
        "time/forward_backward",
        "time/optimizer",
        "expert load max over mean/MoE layer 0",
        "expert load max over mean/MoE layer 1",
        "routing bias spread/MoE layer 0",
        "routing bias spread/MoE layer 1",
        "validation/loss",
    }


def test_what_came_before_a_rollback_is_gone(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 7):
        log.step(record(step))
    log.validation(6, 512 * 6, 5.0)
    for step in (4, 2):  # back twice, on to 5 and to the end
        log.rewind(step)
        for later in range(step + 1, TOTAL + 1 if step == 2 else 6):
            log.step(record(later, loss=float(step)))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    board = [(event.step, event.value) for event in events.Scalars("loss/main")]
    assert board == [(1, 8.0), (2, 4.0), *((step, 2.0) for step in range(3, TOTAL + 1))]
    assert "validation/loss" not in events.Tags()["scalars"] or not events.Scalars("validation/loss")
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == board


def test_figures_that_come_after_later_steps_stay_with_their_own(tmp_path):
    """The profiler's of a step are written some steps later; a killed run's last line may be cut short."""
    log = open_log(tmp_path, 0, "logging.tensorboard=false")
    for step in range(1, 5):
        log.step(record(step))
        log.overlap(max(1, step - 1), {"bubble_fraction": 0.1 * step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')
    open_log(tmp_path, 3, "logging.tensorboard=false").close()
    kept = [(line["kind"], line["step"]) for line in metrics(tmp_path)]
    assert kept == [
        *(("step", 1), ("overlap", 1), ("step", 2), ("overlap", 1), ("step", 3), ("overlap", 2)),
        ("overlap", 3),
    ]


def test_history_without_its_checkpoints_is_kept(tmp_path):
    """A run directory whose checkpoints are gone, or not mounted: it begins anew, and says so."""
    for steps, kept in ((3, False), (6, True)):  # four steps to a checkpoint
        log = open_log(tmp_path, 0, "checkpoint.interval=4", "logging.tensorboard=false")
        for step in range(1, steps + 1):
            log.step(record(step))
        log.close()
        open_log(tmp_path, 0, "checkpoint.interval=4", "logging.tensorboard=false").close()
        assert (tmp_path / "metrics.earlier.jsonl").exists() is kept
        assert metrics(tmp_path) == []
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.earlier.jsonl").read_text().splitlines()] == [
        *range(1, 7)
    ]
    assert "no checkpoint is here, and metrics.jsonl came to step 6" in (tmp_path / "log.txt").read_text()


def test_gpu_figures_have_tags_and_an_unknown_gpu_is_told_once(tmp_path):
    log = open_log(tmp_path)
    log.step(record(1, tflops_per_gpu=400.0))
    log.step(record(2, tflops_per_gpu=400.0))
    log.step(record(3, tflops_per_gpu=400.0, mfu=0.4))
    log.close()
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"speed/TFLOPS per GPU", "speed/MFU"} <= set(tags)
    assert (tmp_path / "log.txt").read_text().count("MFU is left out") == 1


def test_lines_are_logged_at_the_interval(tmp_path):
    log = open_log(tmp_path, 0, "logging.interval=4", "logging.tensorboard=false")
    for step in range(1, TOTAL + 1):
        log.step(record(step))
    log.event("checkpoint done")
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    told = [int(line.split("step ")[1].split("/")[0]) for line in lines if " step " in line]
    assert told == [1, 4, 8, TOTAL]
    assert lines[-1].endswith("checkpoint done")
    assert not (tmp_path / "tensorboard").exists()


def test_what_is_not_finite_is_null(tmp_path):
    log = open_log(tmp_path)
    log.step(record(1, loss=float("nan"), grad_norm=float("inf"), bias_spread=[float("nan"), 0.0]))
    log.step(record(2))
    log.close()
    first = metrics(tmp_path)[0]
    assert (first["loss"], first["grad_norm"], first["bias_spread"]) == (None, None, [None, 0.0])


def test_no_balance_is_left_out(tmp_path):
    log = open_log(tmp_path)
    log.step(record(1, balance_loss=None))
    log.close()
    assert metrics(tmp_path)[0]["balance_loss"] is None
    assert "balance" not in (tmp_path / "log.txt").read_text()
    assert "loss/balance" not in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]


@pytest.mark.parametrize(("tracked", "balance"), [({}, None), ({"seq_load_balancing_loss": [0.0, 3.0, 5.0]}, 4.0)])
def test_balance_is_none_where_nothing_is_tracked(monkeypatch, tracked, balance):
    tracker = {name: {"values": torch.tensor(values)} for name, values in tracked.items()}
    groups = Mock(**{"get_data_parallel_world_size.return_value": 1})
    monkeypatch.setattr(losses, "parallel_state", groups)
    monkeypatch.setattr(losses, "get_moe_layer_wise_logging_tracker", lambda: tracker)
    monkeypatch.setattr(losses.megatron_versions, "tracked_mtp_loss", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    model = SimpleNamespace(num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0)
    assert losses.reduce_losses([{"loss": torch.tensor([6.0, 2.0])}], 1, model) == losses.Losses(3.0, None, balance)


def test_learning_curve(resumed):
    figure = pictures.learning_curve(resumed / "metrics.jsonl")
    losses, rate = figure.axes
    curves = {line.get_label(): line.get_xydata() for line in losses.lines}
    assert set(curves) == {"loss", "MTP loss", "validation"}
    assert curves["loss"].shape == (TOTAL, 2)
    assert curves["validation"].tolist() == [[1024.0, 5.0], [512.0 * TOTAL, 4.0]]
    assert len(rate.lines[0].get_xdata()) == TOTAL
    assert imread(resumed / "learning_curve.png").shape[2] == 4


def test_a_run_that_ends_before_its_first_step_has_no_curve(tmp_path):
    open_log(tmp_path).close()
    assert not (tmp_path / "learning_curve.png").exists()


def test_expert_load_shows_each_cell_over_its_layers_mean(tmp_path):
    load_le = np.array([[10.0, 10.0, 10.0, 10.0], [0.0, 10.0, 10.0, 60.0], [0.0, 0.0, 0.0, 0.0]])
    log = open_log(tmp_path)
    log.expert_load(50, load_le)
    log.close()
    assert imread(tmp_path / "expert_load" / "step_00000050.png").std() > 0.05
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("expert load")[0].step == 50

    axes = pictures.expert_load(load_le, 50).axes[0]
    shown = np.asarray(axes.images[0].get_array())
    assert shown.tolist() == [[1.0, 1.0, 1.0, 1.0], [0.0, 0.5, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]]
    assert [text.get_text().strip() for text in axes.texts] == ["1.00", "3.00", "0.00"]


def test_a_run_that_fails_in_a_terminal_gives_the_cursor_back(tmp_path):
    pytest.importorskip("pty")
    code = (
        "import sys; from pathlib import Path; from dsv3_train.recipe.load import load; "
        "from dsv3_train.training.log import RunLog; "
        f"RunLog(Path({str(tmp_path)!r}), load('smoke', ['logging.tensorboard=false']), total_steps=3); "
        "raise RuntimeError('boom')"
    )
    script = f"import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', {code!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env={**os.environ, "TERM": "xterm"},
    )
    hidden, shown = done.stdout.rfind(b"\x1b[?25l"), done.stdout.rfind(b"\x1b[?25h")
    assert b"boom" in done.stdout
    assert 0 <= hidden < shown


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak(name, tflops):
    assert peak_bf16_tflops(name) == tflops


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_nobody_reads_the_output_any_more(tmp_path, output):
    """A closed pipe (`| head`), a full disk behind `>`: the run goes on, and log.txt has every line."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from test_run_log import open_log, record\n"
        "log = open_log(Path(sys.argv[1]))\n"
        "for step in range(1, 4): log.step(record(step))\n"
        "log.close()\n"
        "print('went on', file=sys.stderr)\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    reads, pipe = os.pipe()
    os.close(reads)
    with open("/dev/full" if output == "full disk" else pipe, "w") as unread:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=unread,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    assert "went on" in done.stderr, done.stderr
    if output == "closed pipe":
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.txt").read_text().count("step ") == 3
