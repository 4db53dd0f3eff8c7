"""`dsv3 numerics run`: which runs it plans, how it trains them, what it does when one fails or it is stopped.

All but the last test put a script in the trainer's place: what is tested is who starts when, on which GPUs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from numeric_runs import TINY
from rich.console import Console
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.numerics import train as training
from dsv3_train.numerics.plan import plan
from dsv3_train.numerics.train import share, train
from dsv3_train.recipe.load import dump, load

CPU = "precision.params=fp32"
SMALL = [
    "schedule.batch_size=4",
    "training.sequence_length=64",
    "training.eval_interval=0",
    "logging.expert_load_interval=0",
    "logging.tensorboard=false",
    "data.prepare.vocab_size=512",
    f"data.prepare.inputs=[{Path(__file__).parents[1] / 'dsv3_train' / 'recipe'}]",
]

TRAINER = f"""#!{sys.executable}
import json, os, pathlib, sys, time
overrides = dict(word.split("=", 1) for word in sys.argv[2:])
run_dir = pathlib.Path(json.loads(overrides["runtime.run_dir"]))
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "started").write_text(json.dumps(dict(at=time.time(), gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))))
if run_dir.name == "blockwise" and os.path.exists("refuse"):
    while not (run_dir.parent / "none" / "started").exists():
        time.sleep(0.05)
    print("some lines before", flush=True)
    sys.exit("no such data")
if os.path.exists("hang"):
    time.sleep(60)
while os.path.exists("pair") and len(list(run_dir.parent.glob("*/started"))) < 2:
    time.sleep(0.05)
(run_dir / "ended").write_text(str(time.time()))
(run_dir / "state").write_text("finished")
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer that writes when it ran, and with which GPUs."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "trainer"
    script.write_text(TRAINER)
    script.chmod(0o755)
    monkeypatch.setattr(training, "_TRAIN", (str(script),))
    return tmp_path


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))


def planned(variants=("blockwise",), seeds=3, overrides=("runtime.device=cuda", "precision.params=bf16"), out="out"):
    return plan(TINY, list(overrides), list(variants), seeds, Path(out))


def test_what_is_planned(tmp_path):
    made = planned(["fp8=blockwise", "blockwise+power_of_2_scales=false+training.recompute=[moe_act]", "none"])
    assert [one.run_dir.name for one in made] == [
        "none", "blockwise", "blockwise+power_of_2_scales=false+training.recompute=_moe_act_", "none-seed1235",
        "none-seed1236",
    ]  # fmt: skip
    assert [one.recipe.precision.fp8 for one in made] == ["none", "blockwise", "blockwise", "none", "none"]
    assert [one.recipe.precision.power_of_2_scales for one in made] == [True, True, False, True, True]
    assert made[2].recipe.training.recompute == ["moe_act"]
    assert [one.recipe.training.seed for one in made] == [1234, 1234, 1234, 1235, 1236]
    assert [one.seed for one in made] == [False, False, False, True, True]
    assert [Path(one.recipe.runtime.run_dir) for one in made] == [one.run_dir for one in made]


def test_pairs_of_the_same_seed(tmp_path):
    cuda = ["runtime.device=cuda", "precision.params=bf16"]
    made = plan(TINY, cuda, ["blockwise"], 2, Path("out"), paired=True)
    assert [one.run_dir.name for one in made] == ["none", "blockwise", "none-seed1235", "blockwise-seed1235"]
    assert [one.recipe.precision.fp8 for one in made] == ["none", "blockwise"] * 2
    assert [one.recipe.training.seed for one in made] == [1234, 1234, 1235, 1235]
    assert [one.seed for one in made] == [False, False, True, False]  # seeds of the baseline


def test_seeds_of_runs_that_begin_at_a_checkpoint():
    """Its weights are whose they are: another order of the data is what seeds can differ in."""
    made = planned(overrides=["runtime.device=cuda", "precision.params=bf16", "data.seed=5", "checkpoint.load=trunk"])
    assert [one.recipe.data.seed for one in made] == [5, 5, 6, 7]
    assert [one.recipe.training.seed for one in made] == [1234, 1234, 1235, 1236]


def test_the_baseline_has_no_fp8_whatever_the_recipe_says():
    fp8 = ["precision.fp8=blockwise", "precision.fp8_params=true", "precision.fp8_dispatch=true",
           "training.recompute=[moe_act]", "precision.swiglu_input=fp8", "precision.attention_output=e5m6",
           "training.seed=7", "runtime.device=cuda", "precision.params=bf16"]  # fmt: skip
    first, second, other = planned(seeds=2, overrides=fp8)
    p = first.recipe.precision
    assert (p.fp8, p.fp8_params, p.fp8_dispatch, p.swiglu_input, p.attention_output) == (
        "none", False, False, "full", "full",
    )  # fmt: skip
    assert other.recipe.precision == p
    assert (first.recipe.training.seed, other.recipe.training.seed) == (7, 8)
    p = second.recipe.precision
    assert (p.fp8, p.fp8_params, p.fp8_dispatch, p.swiglu_input, p.attention_output) == (
        "blockwise", True, True, "fp8", "e5m6",
    )  # fmt: skip


def test_braces_in_the_directory(tmp_path):
    (one, _) = planned(seeds=1, out=str(tmp_path / "a{b}"))
    assert Path(one.recipe.runtime.run_dir.format(name="x")) == tmp_path / "a{b}" / "none"


def test_gpus_are_shared_out_in_turn():
    four = ["0", "1", "2", "3"]
    assert [share(four, 1, slot) for slot in range(6)] == [["0"], ["1"], ["2"], ["3"], ["0"], ["1"]]
    assert [share(four, 2, slot) for slot in range(3)] == [["0", "1"], ["2", "3"], ["0", "1"]]
    assert share(["5"], 1, 1) == ["5"]
    assert share(["0"], 2, 0) == ["0"]


def test_training(trainer):
    """Two at a time, on two GPUs; the second time there is nothing left to do."""
    runs = planned()
    Path("pair").touch()  # the first ones wait for each other
    train(runs, 2, ["4", "6"], quiet())
    started = [json.loads((one.run_dir / "started").read_text()) for one in runs]
    ended = [float((one.run_dir / "ended").read_text()) for one in runs]
    assert [one["gpus"] for one in started[:2]] == ["4", "6"]
    assert {one["gpus"] for one in started} == {"4", "6"}
    assert max(one["at"] for one in started[:2]) < min(ended[:2])
    assert min(one["at"] for one in started[2:]) > min(ended[:2])  # no third beside them
    (runs[1].run_dir / "state").write_text("preempted")
    train(planned(), 2, [], quiet())
    again = [json.loads((one.run_dir / "started").read_text()) for one in runs]
    assert [one == before for one, before in zip(again, started, strict=True)] == [True, False, True, True]
    assert again[1]["gpus"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_cpu_run_keeps_its_environment(trainer):
    runs = planned(["emulated"], 1, ["runtime.device=cpu", CPU])
    train(runs, 1, ["4"], quiet())
    assert json.loads((runs[0].run_dir / "started").read_text())["gpus"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_run_that_fails_ends_the_others(trainer):
    Path("refuse").touch()
    Path("hang").touch()
    with pytest.raises(UserError) as caught:
        train(planned(), 2, [], quiet())
    why = "dsv3 train ended with exit code 1: no such data (all of it: out/blockwise.log)"
    assert str(caught.value) == f"out/blockwise: {why}"
    assert "some lines before" in Path("out/blockwise.log").read_text()
    assert not Path("out/none-seed1235").exists()
    assert Path("out/none/started").exists()
    assert not runs_of(trainer)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_who_stops_takes_the_runs_along(trainer, how):
    Path("hang").touch()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_numerics_run as t\n"
        "t.training._TRAIN = (sys.argv[2],)\n"
        "t.train(t.planned(), 2, [], t.quiet())"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, here, str(trainer / "trainer")],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where a shell has these tests ignore it
    )
    await_files(Path("out/none/started"), Path("out/blockwise/started"))
    assert len(runs_of(trainer)) == 2
    process.send_signal(how)
    code = process.wait(30)
    assert code == (143 if how == signal.SIGTERM else -how)
    if how == signal.SIGKILL:  # the kernel tells the runs, nobody waits for them
        time.sleep(1)
    assert not runs_of(trainer)


def test_another_training_in_the_place_of_a_run(trainer):
    runs = planned()
    runs[1].run_dir.mkdir(parents=True)
    (runs[1].run_dir / "recipe.yaml").write_text(dump(load(TINY, [*runs[1].overrides, "optim.eps=1e-9"])))
    with pytest.raises(
        UserError, match=r"out/blockwise: holds a run with optim\.eps 1e-09, not 1e-08; set another --out"
    ):
        planned()


def test_the_example_of_the_help_in_small(tmp_path, monkeypatch):
    """The real trainer, twice; then a report without training anything again."""
    monkeypatch.chdir(tmp_path)
    shown = " ".join(CliRunner().invoke(main.app, ["numerics", "run", "--help"]).stdout.split())
    example = re.search(r'Example: dsv3 (numerics run .*?40 steps")', shown)
    assert example
    words = [
        *shlex.split(example[1])[:-1],
        "training.duration=20 steps",
        *SMALL,
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--json",
    ]
    figures = json.loads(CliRunner().invoke(main.app, words, catch_exceptions=False).stdout)
    assert figures["steps"]["compared"] == 20
    assert figures["runs"][0]["differs"] == {"precision.fp8": ["none", "emulated"]}
    assert 0 < figures["runs"][0]["loss"]["max_abs"] < 0.05  # it is another arithmetic, and no other training
    out = tmp_path / "runs" / "numerics-smoke"
    names = {"report.html", "report.json", "report.png", "none", "none.log", "emulated", "emulated.log"}
    assert {path.name for path in out.iterdir()} == names
    before = (out / "none.log").read_bytes()
    again = CliRunner().invoke(main.app, words, catch_exceptions=False)
    assert (json.loads(again.stdout), (out / "none.log").read_bytes()) == (figures, before)
    assert "finished before" in again.stderr


def await_files(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs_of(where: Path) -> list[int]:
    """Processes of the script there."""
    import psutil

    script = str(where / "trainer")
    running = psutil.process_iter(["cmdline", "status"])
    return [
        one.pid for one in running if (one.info["cmdline"] or [""])[1:2] == [script] and one.info["status"] != "zombie"
    ]
