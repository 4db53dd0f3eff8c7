"""What fails without each patch to Megatron-core. A patch whose case passes without it is no longer needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3_train.runtime.megatron_versions import superfluous_patches

_NO_CUDA = "Torch not compiled with CUDA enabled|Found no NVIDIA driver"
"""What torch says of a CPU: as built for one, or for GPUs."""
# Patch -> (what it serves, what the error says without it).
CASES = {
    "current_device": ("one", _NO_CUDA),
    "device_argument": ("one", _NO_CUDA),
    "to_cuda": ("pp2", _NO_CUDA),
    "streams": ("one", "torch.cuda.Stream requires CUDA support|CUDA driver version is insufficient"),
    "synchronize": ("save", _NO_CUDA),
    "ranges": ("pairs", "NVTX functions not installed"),
    "record_stream": ("pairs", "unknown parameter type"),
    "random_state": ("one", _NO_CUDA),
    "tensor_type": ("one", "torch.cuda.FloatTensor"),
    "have_te": ("one", "isinstance\\(\\) arg 2 must be a type"),
    "te_gemm": ("one", "te_general_gemm"),
    "split_sizes": ("ep2", "all_to_all_single"),
    "recompute_flag": ("recompute", "FP8GlobalStateManager"),
    "device_random_state": ("random", "a fork moved the random state"),
}

LAYOUTS = ("one", "ep2", "pp2", "recompute", "pairs", "random", "save")
# Run as a script of its own: a process patches Megatron once. What is patched before that is imported comes first, and
# imports it in a process each; the others fork from one that has.
SCRIPT = """
import json, os, sys, traceback
from pathlib import Path
import torch
from parity import tiny, train
from dsv3_train.runtime import cpu
from dsv3_train.runtime.launch import launch

layouts = {
    "one": {},
    "ep2": {"parallel": {"world_size": 2, "expert": 2}},
    "pp2": {"parallel": {"world_size": 2, "pipeline": 2}, "pipeline": {"layout": "Ett|ttmL"}},
    "recompute": {"training": {"recompute": ["layernorm"]}},
    "pairs": {
        "parallel": {"world_size": 4, "pipeline": 2, "expert": 2},
        "pipeline": {"layout": "Ett|ttmL", "schedule": "dualpipe", "overlap_pairs": True},
        "precision": {"params": "bf16"},
    },
    "random": {},
    "save": {},
}
out = Path(sys.argv[1])


def attempt(without, layout):
    recipe = tiny(**layouts[layout])

    def work():
        if "megatron.core" in sys.modules:
            cpu.patch_megatron(without)
        else:
            cpu.install(without)
        import dsv3_train.training.assemble
        if layout == "save":
            from megatron.core.dist_checkpointing.strategies import filesystem_async
            return filesystem_async.FileSystemWriterAsync.preload_tensors([])
        if layout != "random":
            return train(recipe, out, steps=1)
        from dsv3_train.runtime import distributed
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
        distributed.start(recipe, "cpu")
        before = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            torch.rand(1)
        assert torch.equal(torch.get_rng_state(), before), "a fork moved the random state"

    launch(work, recipe.parallel.world_size, "cpu")


results = {}
late = {patch.__name__ for patch in cpu.AFTER_IMPORT} | {""}
for name, layout in sorted(json.loads(sys.argv[2]), key=lambda case: case[0] in late):
    if name in late and "megatron.core" not in sys.modules:
        cpu.import_megatron()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        try:
            attempt({name} - {""}, layout)
            print("trained")
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        results[name or layout] = pipe.read()
    os.waitpid(child, 0)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, str]:
    """What a run of one step prints without each patch, and with all of them."""
    where = tmp_path_factory.mktemp("patches")
    cases = [(name, layout) for name, (layout, _) in CASES.items()] + [("", layout) for layout in LAYOUTS]
    found = {}
    with ThreadPoolExecutor(2) as pool:  # eight cases import Megatron anew, on one core
        for done in pool.map(lambda some: _attempt(where, some), (cases[:6], cases[6:])):
            assert done.returncode == 0, done.stderr
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def _attempt(where: Path, cases: list[tuple[str, str]]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, str(where), json.dumps(cases)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent / "distributed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_all_patches(printed, layout):
    assert printed[layout].strip().endswith("trained"), printed[layout]


@pytest.mark.parametrize("name", CASES)
def test_without(printed, name):
    if name in superfluous_patches():  # not applied to this Megatron-core, which `test_with_all_patches` runs without
        return
    assert "trained" not in printed[name], f"{name} is no longer needed: take it out, or name it superfluous"
    assert re.search(CASES[name][1], printed[name]), printed[name][-2000:]


def test_every_patch_has_its_case():
    from dsv3_train.runtime import cpu

    patches = {patch.__name__ for patch in (*cpu.BEFORE_IMPORT, *cpu.AFTER_IMPORT)}
    # Not shown here: `no_te` needs an installed TE, `no_compile` and `share_storage` save compilation, and without
    # `keep_sent_tensor` losses are wrong at times only (VPP, test_parity).
    assert patches == set(CASES) | {"no_te", "no_compile", "share_storage", "keep_sent_tensor"}
