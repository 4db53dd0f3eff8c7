"""Layers on stages: our parser against Megatron-core's, and the even spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_train.recipe.layout import layout_string, parse, stages, suggestion
from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")

LAYOUTS = [
    "EttttmL",
    "Etttt|(tttt|)*14tmL",
    "Ettt|(tt|)*29,m|L",
    "Et*3|(tt|)*29,m|L",
    "E|t*4|t*2,t*2|mL",
    "(Et|t)*1|t|L",
    "E,t|,|tt,|L",
    "Et|*2tL",
    "(t*2|)*3L",
    "E||tL",
]


def test_the_parser_agrees_with_megatrons():
    distributed.prepare_import("cpu")
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letter = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
    for layout in LAYOUTS:
        theirs = PipelineParallelLayerLayout.parse_str_to_list(layout)
        assert parse(layout) == ["".join(letter[layer] for layer in stage) for stage in theirs], layout


@pytest.mark.parametrize("layout", ["Ett x", "Et(t|)*2)L", "Et*L", "(Et|", "ett|L", "t*99999999999", "((t*999)*999)"])
def test_what_is_no_layout(layout):
    with pytest.raises(ValueError, match=r"can stand|repeats to"):
        parse(layout)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["EttttmL"]),
        (["parallel.pipeline=2"], ["Ett", "ttmL"]),
        (["parallel.pipeline=4", "model.num_nextn_predict_layers=0", "schedule.mtp_weight=0"], ["Et", "t", "t", "tL"]),
        (
            ["parallel.pipeline=2", "pipeline={schedule: interleaved, virtual_stages: 2}"],
            ["Et", "t", "t", "tmL"],  # rank 0, rank 1, rank 0 again, rank 1 again
        ),
    ],
)
def test_without_a_layout_layers_are_spread_evenly(overrides, expected):
    recipe = load(TINY, ["parallel.world_size=4", *overrides])
    assert stages(recipe) == expected
    assert layout_string(recipe) == "|".join(expected)


def test_the_suggested_layout_is_accepted():
    recipe = load("dsv3_671b_2048xh800", ["pipeline.schedule=1f1b"])
    suggested = suggestion(recipe)
    assert parse(suggested)[0] == "Etttt"
    assert "".join(parse(suggested)).count("t") == 61
    load("dsv3_671b_2048xh800", [f"pipeline.layout={suggested}"])
