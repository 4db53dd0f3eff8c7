"""tools/gpu_schedules.py, which needs GPUs for its figures, on a CPU's processes: cases, comparison, results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_schedules.py"


@pytest.mark.slow
def test_schedules_agree_and_results_are_written(tmp_path):
    command = [sys.executable, str(TOOL), "--gpus", "2", "--cpu", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work"), "--schedules", "1f1b", "dualpipe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert list(cases) == ["pp2_ep1_1f1b", "pp2_ep1_dualpipe"]
    dual = cases["pp2_ep1_dualpipe"]
    assert dual["loss_difference"] < 1e-4  # BF16
    assert dual["gradients"]["largest"] < 1e-3
    (pipeline,) = dual["pipelines"]
    assert pipeline["simulated_bubble_fraction"] == pytest.approx(0, abs=1e-9)  # P/2 - 1 of nothing
    assert 0 < pipeline["bubble_fraction"] < 1
    assert (tmp_path / "out" / "pp2_ep1_dualpipe.svg").stat().st_size > 1000
    elastic = json.loads((tmp_path / "out" / "elastic.json").read_text())
    before, after = (elastic[name]["losses"] for name in ("before", "after"))
    assert {step: before[step] for step in "5678"} == pytest.approx(after, rel=1e-5)
    assert "SIGKILL" in elastic["after"]["incidents"][0]
