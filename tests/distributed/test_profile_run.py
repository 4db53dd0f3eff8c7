"""`dsv3 profile run` on real processes: traces, named ranges, and the measured pipeline beside the simulated one."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.pipeline.generate import build
from dsv3_train.pipeline.operations import Compute, Op
from dsv3_train.recipe.load import dump
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import distributed
from parity import in_processes, tiny


@pytest.fixture(scope="module", autouse=True)
def imported():
    distributed.prepare_import("cpu")
    import dsv3_train.training.assemble
    import dsv3_train.training.step  # noqa: F401  once, before forking


def profile(recipe: Recipe, folder: Path, *options: object) -> None:
    (folder / "recipe.yaml").write_text(dump(recipe))
    arguments = ["profile", "run", str(folder / "recipe.yaml"), "--out", str(folder / "out"), *map(str, options)]
    result = CliRunner().invoke(main.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0


def report(folder: Path) -> tuple[dict, list[dict]]:
    """The report, and its pipelines."""
    from dsv3_train.profiling.pipeline_page import write_pipelines

    timed = json.loads((folder / "out" / "pipeline.json").read_text())
    return json.loads((folder / "out" / "report.json").read_text()), write_pipelines(folder / "again", timed)[0]


def test_four_processes_of_dualpipe_draw_their_diagram(tmp_path):
    recipe = tiny(parallel={"world_size": 4, "pipeline": 4}, pipeline={"schedule": "dualpipe"})
    profile(recipe, tmp_path, "--steps", 2, "--warmup", 1, "--ranks", "0,3")
    figures, (pipeline,) = report(tmp_path)
    assert figures["pipelines"] == [pipeline]
    assert [rank["rank"] for rank in pipeline["ranks"]] == [0, 1, 2, 3]
    # Waiting for messages adds to the bubble that the schedule has by itself.
    assert 0 < pipeline["ideal_bubble_fraction"] < 1
    assert pipeline["simulated_bubble_fraction"] <= pipeline["bubble_fraction"] < 1
    assert {"F", "F&B", "I", "W"} <= set(pipeline["ranks"][0]["ms"])
    drawn = ElementTree.parse(tmp_path / "out" / "pipeline.svg").getroot()
    cells = [group for group in drawn.iter("{http://www.w3.org/2000/svg}g") if group.get("class") == "op"]
    timed = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    measured = sum(len(spans) for spans in (rank[0] for rank in timed["pipelines"][0]["steps"]))
    assert len(cells) == 3 * measured  # measured, simulated and ideal
    for rank in figures["ranks"]:
        assert [step["step"] for step in rank["steps"]] == [1, 2]  # the profiler's warm-up is not among them
        assert rank["compute_ms"] + rank["exposed_comm_ms"] + rank["idle_ms"] == pytest.approx(rank["span_ms"])
        names = {row["name"] for row in rank["ranges"]}
        # Rank 0 holds stages 0 and 3 of 4, a layer each, and so does rank 3.
        parts = {"attention", "dispatch", "experts", "combine", "route", "layer 1", "layer 4"}
        assert {f"{part} {way}" for part in parts for way in ("forward", "backward")} <= names
        assert {"p2p post", "p2p wait", "grad reduce", "optimizer"} <= names
        assert any(name.startswith("F stage") and "& B stage" in name for name in names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pipeline.html",
        "pipeline.json",
        "pipeline.svg",
        "rank0.pt.trace.json.gz",
        "rank3.pt.trace.json.gz",
        "report.html",
        "report.json",
        "report.png",
    ]


def test_what_this_machine_cannot_run_is_refused(tmp_path):
    """Before any process starts, and nothing is written."""
    recipe = tiny(precision={"fp8": "blockwise", "params": "bf16"}, runtime={"device": "auto"})
    with pytest.raises(UserError, match=r"precision\.fp8: blockwise needs a GPU; set precision\.fp8=none"):
        profile(recipe, tmp_path)
    assert not (tmp_path / "out").exists()


def test_every_expert_is_sent_as_many_tokens(tmp_path):
    recipe = tiny(parallel={"world_size": 2, "expert": 2}, training={"sequence_length": 256})

    def on_rank(balanced: bool) -> None:
        from dsv3_train.training.assemble import assemble
        from dsv3_train.training.profile import Plan, RandomSteps, measure

        distributed.start(recipe, "cpu")
        trainer = assemble(recipe, "cpu")
        measure(RandomSteps(recipe, "cpu", trainer), Plan(tmp_path, 1, 1, (), balanced))
        counts_le, _ = trainer.load.gather()
        if torch.distributed.get_rank() == 0:
            torch.save(counts_le, tmp_path / f"{balanced}.pt")
        distributed.stop()

    for balanced in (False, True):
        in_processes(functools.partial(on_rank, balanced), 2)
    routed, even = (torch.load(tmp_path / f"{name}.pt") for name in (False, True))
    assert routed.sum() == even.sum()
    assert (routed.amax(1) / routed.mean(1)).min() > 1.2
    assert (even.amax(1) / even.mean(1)).max() < 1.2  # 512 tokens an expert, give or take the root of that


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_sleeping_rank_under_megatrons_schedules_is_named(tmp_path, monkeypatch, schedule):
    from dsv3_train.training import assemble

    plain = assemble.assemble

    def with_a_sleeper(*arguments, **named):
        trainer = plain(*arguments, **named)
        if torch.distributed.get_rank() == 1:
            for model in trainer.models:
                model.register_forward_pre_hook(lambda *_: time.sleep(0.08))
        return trainer

    monkeypatch.setattr(assemble, "assemble", with_a_sleeper)
    pipeline = {"schedule": schedule, "virtual_stages": 2 if schedule == "interleaved" else 1}
    recipe = tiny(parallel={"world_size": 2, "pipeline": 2}, pipeline=pipeline, schedule={"batch_size": 4})
    profile(recipe, tmp_path, "--steps", 1, "--warmup", 1)
    _, (told,) = report(tmp_path)
    assert told["findings"][0]["kind"] == "slow rank"
    assert told["findings"][0]["rank"] == 1
    assert told["ranks"][1]["ms"]["F"] > 80
    assert told["simulated_bubble_fraction"] > told["ideal_bubble_fraction"]


def test_overlapped_pairs_of_megatrons_interleaved_schedule_are_recorded(tmp_path):
    recipe = tiny(
        parallel={"world_size": 4, "pipeline": 2, "expert": 2},
        pipeline={"schedule": "interleaved", "virtual_stages": 2, "overlap_pairs": True, "layout": "Et|t|t|tmL"},
        precision={"params": "bf16"},
        schedule={"batch_size": 8},
    )
    profile(recipe, tmp_path, "--steps", 1, "--warmup", 1)
    figures, told = report(tmp_path)
    assert figures["pairs"]["count"] > 0  # in the trace, by their names
    assert [{"F", "B", "F&B"} == set(rank["ms"]) for one in told for rank in one["ranks"]] == [True] * 4
    assert all(0 < one["simulated_bubble_fraction"] < 1 for one in told)
    known = build("interleaved", 2, 4, 2, pairs=True)
    for pipeline in json.loads((tmp_path / "out" / "pipeline.json").read_text())["pipelines"]:
        for rank, (step,) in enumerate(pipeline["steps"]):
            computed = [event.ops for event in known.events[rank] if isinstance(event, Compute)]
            assert [tuple(Op(*op) for op in ops) for _, _, ops in step] == computed


def test_waits_within_megatrons_pairs_are_no_computation(monkeypatch):
    """Its interleaved schedule hands the waits for its messages into the pair."""
    waited: list[str] = []

    def combined(step, f_model, b_model, b_output_tensor, pre_forward=None, pre_backward=None, late=None):
        assert (pre_forward, pre_backward, late) == (None, None, 3)
        return (torch.ones(1),)

    def wait(name: str) -> None:
        time.sleep(0.2)
        waited.append(name)

    from megatron.core.pipeline_parallel import combined_1f1b

    from dsv3_train.model.stage import Place
    from dsv3_train.profiling.spans import MegatronTimeline

    monkeypatch.setattr(combined_1f1b, "combined_forward_backward_step", combined)
    chunk = object()
    spans = MegatronTimeline([chunk], [Place(0, 1, 4, 0, mirrored=False, replica=False)])
    with spans.installed():
        waits = {f"pre_{name}": functools.partial(wait, name) for name in ("forward", "backward")}
        combined_1f1b.combined_forward_backward_step(None, chunk, None, None, **waits, late=3)
    (span,) = spans.timeline.spans()
    assert waited == ["forward", "backward"]
    assert span.end - span.start < 0.1


def _skewed(out: Path) -> None:
    from dsv3_train.profiling.clocks import offsets

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    apart = offsets(lambda: time.perf_counter() + 5.0 * rank, where=f"machine {rank}")
    same = offsets(lambda: time.perf_counter() + 5.0 * rank, where="one machine")
    (out / f"{rank}.json").write_text(json.dumps([apart, same]))
    torch.distributed.destroy_process_group()


def test_clocks_of_other_machines_are_measured(tmp_path):
    in_processes(functools.partial(_skewed, tmp_path), 3)
    for rank in range(3):
        apart, same = json.loads((tmp_path / f"{rank}.json").read_text())
        assert apart == pytest.approx([0, 5, 10], abs=0.05)
        assert same == [0, 0, 0]


def _watch(recipe: Recipe, out: Path) -> None:
    from dsv3_train.profiling.live import Watch
    from dsv3_train.training.assemble import assemble
    from dsv3_train.training.profile import RandomSteps

    distributed.start(recipe, "cpu")
    steps = RandomSteps(recipe, "cpu", assemble(recipe, "cpu"))
    rank = torch.distributed.get_rank()
    if rank == 1:
        for model in steps.trainer.models:
            model.register_forward_pre_hook(lambda *_: time.sleep(0.08))
    watch, found = Watch(recipe, out, steps.trainer), []
    for number in range(1, 5):
        watch.watched(steps.step, number)()
        found.append(watch.figures(number))
    (out / f"{rank}.json").write_text(json.dumps(found))
    distributed.stop()


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_a_run_tells_bubble_straggler_and_exposed_communication_when_it_is_their_turn(tmp_path, schedule):
    recipe = tiny(
        parallel={"world_size": 2, "pipeline": 2},
        pipeline={"schedule": schedule},
        schedule={"batch_size": 4},
        logging={"pipeline_interval": 2, "trace_interval": 4},
    )
    in_processes(functools.partial(_watch, recipe, tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == first[2] == {}
    assert first[1] == second[1]
    assert first[1]["straggler"] == first[1]["slowest_rank"] == 1
    assert 0.2 < first[1]["bubble_fraction"] < 1  # of rank 0, which waits for the sleeper
    assert first[3]["exposed_comm_ms"] >= 0
    assert Path(first[3]["trace"]).is_file()
    assert "trace" not in second[3]
