"""The report of a trace against torch.profiler's own table of the same run."""

from __future__ import annotations

import pytest
import torch

from traces import own_times


def test_own_times_of_operators_are_those_of_torchs_table(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.LayerNorm(512), torch.nn.Linear(512, 8)
    )
    x = torch.randn(256, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            torch.nn.functional.cross_entropy(model(x), torch.zeros(256, dtype=torch.long)).backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    ours = own_times(tmp_path / "trace.json")
    theirs = {row.key: row.self_cpu_time_total / 1e3 for row in profiler.key_averages()}
    assert ours.keys() <= theirs.keys()
    assert {"aten::addmm", "aten::mm", "aten::native_layer_norm"} <= ours.keys()
    for name, ms in ours.items():
        assert ms == pytest.approx(theirs[name], rel=0.01, abs=0.01), name
    assert sum(ours.values()) == pytest.approx(sum(theirs[name] for name in ours), rel=0.01)
