"""Micro-batches as a CUDA graph compute what they compute without."""

from __future__ import annotations

import torch
from test_te import on_gpu


def test_a_replayed_micro_batch_is_the_same_as_one_launched_by_the_host(tmp_path):
    """Losses of six steps, of which all but the first are replayed, and the weights after them; also recomputing."""
    for number, recompute in enumerate(([], ["layernorm", "mla_up_proj", "moe_act"])):
        runs = []
        for graph in (True, False):
            out = tmp_path / f"{number}-{graph}"
            out.mkdir()
            changes = {"precision": {"params": "bf16"}, "training": {"recompute": recompute}}
            runs.append(on_gpu(out, runtime={"cuda_graph": graph}, **changes))
        with_graph, without = runs
        torch.testing.assert_close(with_graph["losses"], without["losses"], rtol=1e-4, atol=0)
        for name, weight in without["weights"].items():
            error = (with_graph["weights"][name].float() - weight.float()).norm() / weight.float().norm()
            assert error < 1e-3, (float(error), name)
