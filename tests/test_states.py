"""What one process holds, by arithmetic, against the model itself built on the meta device."""

import resource

import pytest

from dsv3_train.planner.states import held, state_bytes
from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed

PIPELINE = ["parallel.pipeline=2", "parallel.world_size=2"]
FOUR = ["parallel.world_size=4", "parallel.expert=2"]


@pytest.mark.parametrize(
    ("ref", "overrides"),
    [
        ("smoke", []),
        ("smoke", ["model.q_lora_rank=null"]),
        ("smoke", ["model.num_nextn_predict_layers=0", "schedule.mtp_weight=0"]),
        ("smoke", [*PIPELINE, "pipeline.layout=Ettt|tmL"]),
        ("smoke", [*FOUR, "parallel.tensor=2"]),
        ("smoke", [*FOUR, "parallel.tensor=2", "parallel.expert_tensor=2"]),
        (
            "smoke",
            [*PIPELINE, "pipeline.layout=Et|t|t|tmL", "pipeline.schedule=interleaved", "pipeline.virtual_stages=2"],
        ),
        ("smoke", [*PIPELINE, "pipeline.layout=Et|t|t|tmL", "pipeline.schedule=dualpipev"]),
        ("dsv3_671b_2048xh800", ["pipeline.schedule=1f1b", "parallel.expert=128", "precision.fp8=none"]),
    ],
)
def test_values_per_process(ref, overrides):
    distributed.prepare_import("cpu")
    from dsv3_train.planner.account import account

    recipe = load(ref, overrides)
    counted = [0] * recipe.parallel.pipeline
    for stage in account(recipe).stages:
        counted[stage.pipeline_rank] += stage.parameters_per_rank
    assert [rank.dense + rank.experts for rank in held(recipe)] == counted


def test_dualpipe_holds_two_stages_per_rank():
    once = held(load("dsv3_671b_2048xh800", ["pipeline.schedule=1f1b"]))
    recipe = load("dsv3_671b_2048xh800", ["pipeline.schedule=dualpipe"])
    twice = held(recipe)
    assert [rank.experts for rank in twice] == [a.experts + b.experts for a, b in zip(once, once[::-1], strict=True)]
    # The first and the last rank hold both ends of the model, and one embedding between them and MTP.
    embedding = recipe.model.vocab_size * recipe.model.hidden_size
    shared = [embedding, *[0] * 14, embedding]
    assert [rank.dense for rank in twice] == [
        a.dense + b.dense - saved for a, b, saved in zip(once, once[::-1], shared, strict=True)
    ]


@pytest.mark.parametrize(
    ("overrides", "dense", "expert"),
    [
        ([], 4 + 4 + 8, 4 + 4 + 8),  # FP32 weight and gradient; two FP32 moments
        (["precision.params=bf16"], 2 + 4 + 4 + 8, 2 + 4 + 4 + 8),  # and an FP32 master weight
        (["precision.params=bf16", "precision.adam_moments=bf16"], 2 + 4 + 4 + 4, 2 + 4 + 4 + 4),
        (["parallel.world_size=2", "parallel.zero1=false"], 4 + 4 + 8, 4 + 4 + 8),
        (["parallel.world_size=2"], 4 + 4 + 8 / 2, 4 + 4 + 8 / 2),  # ZeRO-1 over two replicas
        (["parallel.world_size=2", "parallel.expert=2"], 4 + 4 + 8 / 2, 4 + 4 + 8),  # each expert once
    ],
)
def test_bytes_per_value(overrides, dense, expert):
    recipe = load("smoke", overrides)
    [rank] = held(recipe)
    assert state_bytes(recipe) == rank.dense * dense + rank.experts * expert


def test_nothing_of_a_huge_model_is_real_memory():
    """64 GiB of router weights: 16,384 experts x a width of 2^20, in each of 4 layers."""
    distributed.prepare_import("cpu")
    from dsv3_train.planner.account import account

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = load("dsv3_tiny", ["model.n_routed_experts=16384", "model.hidden_size=1048576"])
    assert account(recipe).main > 16384 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1 << 20)  # KiB


def test_copies_of_a_stage_are_not_listed():
    """As many parameters with 2^20 processes as with one, at once."""
    distributed.prepare_import("cpu")
    from dsv3_train.planner.account import account

    alone, many = (
        account(load("dsv3_tiny", [f"parallel.world_size={n}", f"schedule.batch_size={8 * n}"])) for n in (1, 1 << 20)
    )
    assert many == alone
