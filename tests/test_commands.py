"""`dsv3 train` and `dsv3 generate` as a user runs them, small; and what they say to bad checkpoints."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dsv3_cli import main
from dsv3_train.data.prepare import prepare
from dsv3_train.recipe.schema import Prepare
from dsv3_train.training import rundir

SMALL = [
    "training.eval_interval=4",
    "training.eval_sequences=8",
    "logging.expert_load_interval=4",
    "checkpoint.interval=4",
    "schedule.batch_size=8",
    "data.prepare.vocab_size=512",
    "data.prepare.output=data/own",
    f"data.prepare.inputs=[{Path(__file__).parents[1] / 'dsv3_train'}]",
]


def dsv3(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", "dsv3_cli.main", *arguments], capture_output=True, text=True, cwd=cwd)
    assert not check or done.returncode == 0, done.stderr
    return done


def at_once(*commands: tuple[list[str], Path], check: bool = True) -> list[subprocess.CompletedProcess]:
    """Commands with their directories, two at a time: most of each is what one core imports."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: dsv3(*one[0], cwd=one[1], check=check), commands))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Six steps of `smoke` on this project's sources, in four processes, stopped by its duration at four before."""
    where = tmp_path_factory.mktemp("run")
    dsv3("train", "smoke_parallel", *SMALL, "training.duration=4 steps", cwd=where)
    dsv3("train", "smoke_parallel", *SMALL, "training.duration=6 steps", cwd=where)
    return where


def test_run_directory(trained):
    run = trained / "runs" / "smoke_parallel"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert "resumed from" in (run / "log.txt").read_text()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    for name in ("recipe.yaml", "environment.json", "topology.json", "learning_curve.png", "data.json"):
        assert (run / name).stat().st_size > 0
    assert (run / "tokenizer" / "tokenizer_config.json").is_file()
    saved = torch.load(run / "checkpoints" / "step_00000006" / "common.pt", weights_only=True)
    assert saved["tokenizer"] == hashlib.sha256((run / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    assert saved["data"] == {path: met["identity"] for path, met in json.loads((run / "data.json").read_text()).items()}
    assert json.loads((run / "topology.json").read_text())["pipeline"] == 2
    assert (run / "expert_load" / "step_00000004.png").is_file()
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.unfinished"))


def test_the_order_of_samples_can_be_there_before_the_run(trained):
    """What `dsv3 data index` builds is what the run looks for: built by the run, it finds it there."""
    recipe = ["data", "index", "smoke_parallel", *SMALL, "training.duration=6 steps", "--json"]
    done = at_once((recipe, trained), ([*recipe, "runtime.run_dir=runs/to_come"], trained))
    there, built = (json.loads(one.stdout) for one in done)
    assert (there["seconds"], there["samples"]) == (0, built["samples"])
    assert built["seconds"] > 0
    caches = [trained / "runs" / name / "cache" for name in ("smoke_parallel", "to_come")]
    theirs, ours = ({str(file.relative_to(cache)) for file in cache.rglob("*")} for cache in caches)
    assert len(ours) > 5
    assert ours < theirs  # which have those of four steps too


def test_generate(trained):
    run = ["generate", "runs/smoke_parallel", "--max-tokens", "5", "--json"]
    first, again = at_once(*[([*run, "--prompt", "def "], trained)] * 2)
    report = json.loads(first.stdout)
    assert (report["step"], report["prompt"]) == (6, "def ")
    assert 0 < report["tokens"] <= 5
    assert json.loads(again.stdout) == report  # the seed decides
    greedy = [*run, "--temperature", "0"]
    two, one = at_once(([*greedy, "parallel={world_size: 2, expert: 2}"], trained), (greedy, trained))
    assert json.loads(two.stdout) == json.loads(one.stdout)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """One line that names the parts, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_checkpoints_that_are_refused(trained, tmp_path):
    """Code in a pickle, a cut file, another model, nothing at all: one line, and the run directory as it was."""
    newest = Path("runs/smoke_parallel/checkpoints/step_00000006")
    piece = max((trained / newest).glob("*.distcp"), key=lambda file: file.stat().st_size).name  # one with weights
    whole, common = ((trained / newest / name).read_bytes() for name in (piece, "common.pt"))
    generate = ["generate", "runs/smoke_parallel"]
    longer = ["train", "smoke_parallel", *SMALL, "training.duration=8 steps"]
    elsewhere = ["pipeline={}", "parallel={world_size: 1}", "runtime.run_dir=runs/new", f"checkpoint.load={newest}"]
    # Files of the newest checkpoint and what becomes of them (None: gone, as an older version left it, or somebody with
    # bad intentions); a command; what it says.
    cases: list[tuple[dict[str, bytes | None], list[str], tuple[str, ...]]] = [
        ({piece: whole[:100]}, generate, (newest.name, "damaged", piece)),
        ({piece: flipped(whole)}, generate, (newest.name, "damaged", piece)),
        ({piece: whole[:100], "manifest.json": None}, generate, (newest.name, "cut short, 100 of")),
        ({".metadata": pickle.dumps(_Harmful()), "manifest.json": None}, generate, (".metadata", "mkdir")),
        ({"common.pt": common[: len(common) // 2], "manifest.json": None}, generate, ("common.pt",)),
        ({}, [*longer, "model.hidden_size=192"], ("recipe.yaml", "model.hidden_size")),
        ({}, [*longer, *elsewhere, "model.v_head_dim=64"], ("another model", "linear_proj")),
        ({}, ["generate", "runs/none"], ("runs/none", "no checkpoint")),
    ]
    places = [tmp_path / str(number) for number in range(len(cases))]
    for place, (changes, _, _) in zip(places, cases, strict=True):
        shutil.copytree(trained, place)
        for name, content in changes.items():
            file = place / newest / name
            file.unlink() if content is None else file.write_bytes(content)
    done = at_once(*((command, place) for place, (_, command, _) in zip(places, cases, strict=True)), check=False)
    for place, (_, _, parts), one in zip(places, cases, done, strict=True):
        refused(one, *parts)
        assert not (place / "harmed").exists()
        metrics = [where / "runs" / "smoke_parallel" / "metrics.jsonl" for where in (place, trained)]
        assert metrics[0].read_text() == metrics[1].read_text()


def flipped(data: bytes) -> bytes:
    """With one bit wrong in the middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damaged_checkpoints(trained, tmp_path):
    """One wrong bit in the newest: named, set aside, and the one before it used. In all: refused."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "runs" / "smoke_parallel" / "checkpoints"
    longer = ["train", "smoke_parallel", *SMALL, "training.duration=7 steps", "checkpoint.interval=0"]
    run = checkpoints.parent
    (run / "data.json").unlink()  # as before runs kept it, and a tokenizer
    shutil.rmtree(run / "tokenizer")

    def damage(step: int) -> None:
        piece = min((checkpoints / f"step_{step:08d}").glob("*.distcp"))
        piece.write_bytes(flipped(piece.read_bytes()))

    damage(6)
    (checkpoints / "step_00000006" / "checked").touch()
    done = dsv3(*longer, cwd=tmp_path)
    assert "step_00000006: damaged (__0_0.distcp: its SHA-256" in done.stdout
    assert "step_00000004 at step 4" in done.stdout
    assert "data.json: records from now on which data this run is trained on" in done.stdout
    assert f"{run.name}/tokenizer: made from data/own.tokenizer.json" in done.stdout
    assert (run / "data.json").is_file()
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    assert (checkpoints / "step_00000006.damaged" / "checked").is_file()
    damage(4)
    damage(7)
    for why in ("(__0_0.distcp: its SHA-256", "damaged, and"):  # none is left to begin with the second time
        refused(dsv3(*longer, cwd=tmp_path, check=False), "step_00000007.damaged: damaged", why, "train anew")


def test_other_data_or_another_tokenizer_at_the_same_place(trained, tmp_path):
    """A resume says so, and leaves the run as it was."""
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": f"another text {number} " * 200}) + "\n" for number in range(400)))
    places = [tmp_path / name for name in ("data", "tokenizer")]
    for place in places:
        shutil.copytree(trained, place)
        given = {"tokenizer": str(place / "data/own.tokenizer.json")} if place.name == "data" else {"vocab_size": 300}
        for end in ("bin", "idx", "manifest.json"):
            (place / f"data/own.{end}").unlink()
        prepare(Prepare(inputs=[str(source)], output=str(place / "data/own"), **given), workers=1)
    longer = ["train", "smoke_parallel", "data.prepare=null", "data.train=[{path: data/own}]", *SMALL[:-3]]
    longer.append("training.duration=8 steps")
    data, tokenizer = at_once(*((longer, place) for place in places), check=False)
    refused(data, "data/own: is not the data that runs/smoke_parallel was trained on up to step_00000006")
    refused(tokenizer, "data/own", "another tokenizer than this model's, runs/smoke_parallel/tokenizer")
    for place in places:
        run = Path("runs/smoke_parallel")
        assert not filecmp.dircmp(place / run, trained / run).diff_files


def test_a_second_run_in_the_same_directory(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs" / "smoke_parallel"
    rundir.hold(run)

    def files() -> dict[Path, bytes]:
        return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = files()
    longer = ["training.duration=8 steps", "schedule.lr=1e-4"]
    done = dsv3("train", "smoke_parallel", *SMALL, *longer, cwd=tmp_path, check=False)
    refused(done, f"runs/smoke_parallel: in use by process {os.getpid()} on ", "set another runtime.run_dir")
    assert files() == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian", "dsv3: no such command 'trian'. Did you mean 'train'? (dsv3 --help)\n"),
        ("train smoke --foo", "dsv3 train: no such option: --foo (dsv3 train --help)\n"),
        ("slurm submit", "dsv3 slurm submit: missing argument 'recipe' (dsv3 slurm submit --help)\n"),
        ("profile", ""),  # its help
    ],
)
def test_a_wrong_command_line_is_one_line(command, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsv3", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 2
    assert capsys.readouterr().err == said


def test_data_that_is_not_there(tmp_path):
    wrong = ["data={train: [{path: data/nothing}]}"]
    refused(dsv3("train", "smoke_parallel", *wrong, cwd=tmp_path, check=False), "data.train", "data/nothing")
    assert not list(tmp_path.iterdir())


def test_launcher_with_another_world(tmp_path):
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "dsv3_cli.main", "train", "smoke_parallel"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    refused(done, "parallel.world_size", "4", "3")
    assert not list(tmp_path.iterdir())


def test_torchrun_joins(trained, tmp_path):
    """Under torchrun the ranks join; the same steps, the same losses."""
    shutil.copytree(trained / "data", tmp_path / "data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"]
    command = [*torchrun, "-m", "dsv3_cli.main", "train", "smoke_parallel", *SMALL, "training.duration=4 steps"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr

    def losses(where: Path) -> list[float]:
        lines = (where / "runs" / "smoke_parallel" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines][:3]

    assert losses(tmp_path) == losses(trained)
