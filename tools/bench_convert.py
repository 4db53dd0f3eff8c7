"""Memory and speed of `dsv3 convert` on growing FP8 models of random values.

    python tools/bench_convert.py --layers 2 4 8 --repeats 3

For each size: peak memory of from-hf and to-hf (all processes, beyond idle ones), and their time beside two others in
the same run: a plain copy of the same bytes, and a conversion that loads everything first. Times are minima; what
another process does meanwhile shows in all of them. Needs about 20 bytes of disk for each parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from synthetic_hf import CONFIG, tensors

from dsv3_train.checkpoint.hf import files, fp8

SMALLER = {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
}
_PER_FILE = 1_000_000_000


def make(path: Path, layers: int) -> int:
    """A directory of random FP8 and BF16 values; its bytes."""
    config = {**CONFIG, **SMALLER, "num_hidden_layers": layers}
    path.mkdir()
    groups: list[dict] = [{}]
    size = 0
    for name, dtype, shape in tensors(config):
        nbytes = prod(shape) * files.itemsize(dtype)
        if size + nbytes > _PER_FILE and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = (dtype, tuple(shape))
        size += nbytes
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, contents in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(contents, name)
        plan = files.layout(path / name, contents)
        with (path / name).open("wb", buffering=0) as file:
            os.pwrite(file.fileno(), plan.header, 0)
            for stored in plan.tensors.values():
                files.write_at(file.fileno(), _random(stored, generator), stored.begin)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in path.iterdir())


def _random(stored: files.Stored, generator: torch.Generator) -> torch.Tensor:
    if stored.dtype == "F8_E4M3":
        codes = torch.randint(0, 255, stored.shape, dtype=torch.uint8, generator=generator)
        codes[codes == 0x7F] = 0x7E  # no NaN
        return codes
    values = torch.rand(stored.shape, generator=generator) * 1e-4 + 1e-6
    return values.to(files.DTYPES[stored.dtype])


class Peak:
    """The largest sum of resident memory of a process and its children, by looking often."""

    def __init__(self, pid: int) -> None:
        self.process, self.bytes, self.processes = psutil.Process(pid), 0, 1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                family = [self.process, *self.process.children(recursive=True)]
                total = sum(one.memory_info().rss for one in family)
            except psutil.Error:
                continue
            if total > self.bytes:
                self.bytes, self.processes = total, len(family)
            self._stop.wait(0.01)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def command(*arguments: str) -> tuple[float, Peak]:
    """Seconds of a `dsv3` command, and its memory."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "dsv3_cli.main", *arguments], stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    code = process.wait()
    peak.stop()
    assert code == 0
    return time.perf_counter() - begun, peak


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy that ends on the disk."""
    begun = time.perf_counter()
    for file in source.rglob("*"):
        if file.is_file():
            shutil.copyfile(file, target)
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - begun


def naive(source: Path, target: Path) -> None:
    """Load everything, dequantise everything, stack the experts, save everything. (Runs in a process of its own.)"""
    torch.set_num_threads(1)
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        loaded |= load_file(file)
    scales = {name: tensor for name, tensor in loaded.items() if name.endswith("_scale_inv")}
    weights = {
        name: fp8.dequantise(tensor, scales[f"{name}_scale_inv"]) if f"{name}_scale_inv" in scales else tensor
        for name, tensor in loaded.items()
        if name not in scales
    }
    for name in [name for name in weights if ".experts.0." in name]:
        numbers = range(SMALLER["n_routed_experts"])
        weights[name.replace(".0.", ".")] = torch.stack(
            [weights.pop(name.replace(".0.", f".{e}.", 1)) for e in numbers]
        )
    torch.save(weights, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def one_size(where: Path, layers: int, workers: int, repeats: int) -> dict:
    """Figures of one size."""
    source, run, back = where / "hf", where / "run", where / "back"
    nbytes = make(source, layers)
    rows: dict[str, list[float]] = {"from_hf": [], "to_hf": [], "copy_in": [], "copy_out": [], "naive": []}
    peaks: dict[str, Peak] = {}
    for _ in range(repeats):
        for path in (run, back):
            shutil.rmtree(path, ignore_errors=True)
        seconds, peaks["from_hf"] = command("convert", "from-hf", str(source), str(run), "--workers", str(workers))
        rows["from_hf"].append(seconds)
        rows["copy_out"].append(copied(run / "checkpoints", where / "copy"))
        rows["copy_in"].append(copied(source, where / "copy"))
        seconds, peaks["to_hf"] = command("convert", "to-hf", str(run), str(back), "--workers", str(workers))
        rows["to_hf"].append(seconds)
        begun = time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, "--naive", str(source), str(where / "copy")])
        peaks["naive"] = Peak(process.pid)
        assert process.wait() == 0
        peaks["naive"].stop()
        rows["naive"].append(time.perf_counter() - begun)
    same = subprocess.run(
        [sys.executable, "-m", "dsv3_cli.main", "convert", "verify", str(source), str(back), "--no-logits"]
    )
    assert same.returncode in (0, 1)
    best = {name: min(times) for name, times in rows.items()}
    written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    return {
        "layers": layers,
        "workers": workers,
        "fp8_bytes": nbytes,
        "fp32_bytes": written,
        "seconds": best,
        "from_hf_over_copy_of_what_it_writes": best["from_hf"] / best["copy_out"],
        "to_hf_over_copy_of_what_it_reads": best["to_hf"] / best["copy_out"],
        "from_hf_over_naive": best["from_hf"] / best["naive"],
        "peak_mib": {name: peak.bytes / 2**20 for name, peak in peaks.items()},
        "processes": {name: peak.processes for name, peak in peaks.items()},
        "identical": same.returncode == 0,
    }


def idle_mib() -> float:
    """Resident memory of an interpreter with this program's imports and nothing to do."""
    call = (
        "import psutil; from dsv3_train.checkpoint.hf import from_hf, to_hf; print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--where", type=Path, default=None, help="On the disk to measure [default: the system's].")
    parser.add_argument("--naive", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.naive:
        naive(*asked.naive)
        sys.exit()
    idle = idle_mib()
    print(f"idle interpreter with torch: {idle:.0f} MiB")
    for size in asked.layers:
        with tempfile.TemporaryDirectory(dir=asked.where) as scratch:
            row = one_size(Path(scratch), size, asked.workers, asked.repeats)
            row["beyond_idle_mib"] = {
                name: peak - idle * row["processes"][name] for name, peak in row["peak_mib"].items()
            }
            print(json.dumps(row, indent=1), flush=True)
