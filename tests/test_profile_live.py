"""What a run logs of its overlap: the figures, and where they go."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3_train.profiling.live import summary
from dsv3_train.recipe.load import load
from dsv3_train.training.log import RunLog


def test_bubble_and_slowest_rank_of_two_pipelines():
    found = summary([(80.0, 100.0), (90.0, 100.0), (84.0, 120.0), (108.0, 120.0)])
    assert found["bubble_fraction"] == pytest.approx(0.3)
    assert (found["slowest_rank"], found["straggler"]) == (3, 3)
    assert found["slowest_over_median"] == pytest.approx(108 / 87)
    assert summary([(80.0, 100.0), (90.0, 100.0)])["straggler"] is None


def test_figures_go_to_metrics_tensorboard_and_log(tmp_path):
    import json

    log = RunLog(tmp_path, load("smoke", []), total_steps=10)
    figures = {
        **summary([(50.0, 100.0), (90.0, 100.0), (50.0, 100.0)]),
        "exposed_comm_ms": 2.5,
        "hidden_fraction": None,
    }
    log.overlap(4, figures)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "overlap", "step": 4, **figures}
    assert "step 4: rank 1 computes 1.80x as long as the median rank" in (tmp_path / "log.txt").read_text()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    told = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert told == {
        "overlap/bubble fraction": pytest.approx(0.5),
        "overlap/slowest rank": 1.0,
        "overlap/slowest over median": pytest.approx(1.8),
        "overlap/exposed comm ms": 2.5,
    }
