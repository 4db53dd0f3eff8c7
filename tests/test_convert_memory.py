"""Peak memory of conversion does not grow with the model, and stays under what is stated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_train.checkpoint.hf.work import WORKER_BYTES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from synthetic_hf import CONFIG, make

SIZES = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 16384,  # as many values as are held at once
    "moe_intermediate_size": 512,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
MEASURED = """
import sys
from pathlib import Path
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import from_hf, to_hf
def peak():  # not ru_maxrss, in which the process that started this one counts too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
source, target = map(Path, sys.argv[2:])
if sys.argv[1] == "in":
    from_hf.convert(from_hf.make_plan(source, None, [], None, None, "x"), target, 1, lambda *_: None)
else:
    to_hf.convert(to_hf.make_plan(resolve(source), None, None), target, 1, lambda *_: None)
print((peak() - before) * 1024)
"""


def peak(*arguments: str) -> int:
    """Bytes of resident memory beyond the interpreter with its imports, mapped files included."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_flat(tmp_path):
    """0.6 and 0.9 GB of FP32: tensors are as large in both, and so is what is held at once."""
    peaks: dict[str, list[int]] = {"in": [], "out": []}
    for experts in (16, 40):
        source, run, back = (tmp_path / f"{name}{experts}" for name in ("hf", "run", "back"))
        config = {**CONFIG, **SIZES, "num_hidden_layers": 3, "n_routed_experts": experts}
        make(source, config, per_file=200_000_000)
        peaks["in"].append(peak("in", str(source), str(run)))
        peaks["out"].append(peak("out", str(run), str(back)))
    for small, large in peaks.values():
        assert 100e6 < large < WORKER_BYTES
        assert large < small + 64e6  # what a mapping holds when it is looked at differs from run to run
