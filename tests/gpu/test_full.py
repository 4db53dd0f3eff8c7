"""A GPU that a recipe does not fit on."""

from __future__ import annotations

import subprocess
import sys


def test_a_full_gpu_is_told_in_one_line(tmp_path):
    """1024 sequences of 4096 tokens at once: their logits alone are 268 GB in BF16."""
    command = [sys.executable, "-m", "dsv3_cli.main", "profile", "run", "dsv3_tiny", "training.micro_batch_size=1024"]
    command += ["schedule.batch_size=1024", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    *_, said = done.stderr.splitlines()
    assert said.startswith("CUDA out of memory. Tried to allocate")
    assert "training.micro_batch_size=1, training.recompute=[layernorm, mla_up_proj, moe_act]" in said
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))
