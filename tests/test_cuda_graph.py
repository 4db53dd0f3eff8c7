"""Which runs replay their micro-batches as CUDA graphs. What a graph computes is compared in tests/gpu/."""

from __future__ import annotations

import pytest

from dsv3_train.recipe.load import load
from dsv3_train.training.cuda_graph import why_not

DATA = "data={train: [{path: unused}]}"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["runtime.cuda_graph=false"], "runtime.cuda_graph is false"),
        (["parallel={world_size: 2, pipeline: 2}"], "a pipeline's operations are run one by one"),
        (["parallel={world_size: 2, tensor: 2}"], "ranks exchange tensors within a micro-batch"),
        (["parallel={overlap_param_gather: true, overlap_grad_reduce: true}"], "ranks exchange tensors"),
        (["precision.fp8=blockwise"], "FP8 experts take their counts from the host"),
    ],
)
def test_a_layout_that_cannot_be_a_graph_says_why(overrides, reason):
    recipe = load("dsv3_tiny", ["data.prepare=null", DATA, *overrides])
    assert reason in (why_not(recipe, "cuda", []) or "")


def test_a_cpu_has_no_graphs():
    assert why_not(load("smoke", []), "cpu", []) == "there is no GPU"
