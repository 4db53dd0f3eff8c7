"""What recipes, paths, options and a run directory's files say is text: none of it becomes shell, or an option."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_slurm import STAND_INS, directives
from typer.testing import CliRunner

from dsv3_cli import main
from dsv3_train.errors import UserError
from dsv3_train.runtime import cluster, incidents
from dsv3_train.runtime.slurm_jobs import cancel, prepare, status

NAME = """a b #1 50%j 'x' $(touch PWNED) `touch PWNED`; touch PWNED & {{"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a name, and stand-ins for SLURM that write down how they were called."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    where = tmp_path / NAME
    where.mkdir()
    monkeypatch.chdir(where)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DSV3_CLUSTER", str(tmp_path / "cluster.yaml"))
    (tmp_path / "cluster.yaml").write_text("{}")
    return where


def site(text: str) -> None:
    Path(os.environ["DSV3_CLUSTER"]).write_text(text)


def submit(*overrides: str, after: str | None = None, **given: str):
    return prepare("smoke", list(overrides), [], given, after=after)


def test_names_stand_in_quotes(here, monkeypatch):
    """tools/slurm_here.py's SLURM 22.05 has taken such a script: its output and its run are in these directories."""
    program = here / "python"
    program.write_text('#!/bin/sh\necho "$3 $4" >ran\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (here.parent / "bin" / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    job = submit(f"runtime.run_dir={json.dumps('runs/' + NAME)}", account="two words", after="41_7")
    assert f'--chdir="{here}"' in directives(job.script)
    bare = NAME.replace("{{", "{")
    assert (
        f'--output="{here.parent}/{NAME.replace("%", "%%")}/runs/{bare.replace("%", "%%")}/slurm/%j.out"'
        in directives(job.script)
    )
    assert {'--account="two words"', "--dependency=afterany:41_7"} <= set(directives(job.script))
    job.submit()
    environment = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n7", "RUN_DIR": "", "JOB": ""}
    script = here / "runs" / bare / "slurm" / "script.sh"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert (here / "ran").read_text() == f"train {script.parent / 'recipe.yaml'}\n", done.stderr
    assert not list(here.rglob("PWNED"))


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x85", "\u2028", "\u202e", "\t"], ids=ascii)
def test_a_control_character_is_refused_where_it_stands(character):
    text = json.dumps(f"runs/x{character}touch PWNED #")
    for key in ("runtime.run_dir", "checkpoint.load", "data.tokenizer", "name", "data.train", "data.prepare"):
        inside = {"data.train": f"[{{path: {text}}}]", "data.prepare": f"{{inputs: [{text}], output: x}}"}
        with pytest.raises(UserError, match=rf"{key}") as refused:
            submit(f"{key}={inside.get(key, text)}")
        assert len(str(refused.value).splitlines()) == 1


def test_options_that_cannot_stand_in_a_script(here, monkeypatch):
    for name in ("partition", "account"):
        with pytest.raises(UserError, match=rf"^--{name}: .*x\\ntouch PWNED"):
            submit(**{name: "x\ntouch PWNED"})
        with pytest.raises(UserError, match=rf"^--{name}: 'x\"y'"):
            submit(**{name: 'x"y'})
    for after in ("7\ntouch PWNED", "--wrap=touch", "7 8", ""):
        with pytest.raises(UserError, match=r"^--after: .* is no job's number"):
            submit(after=after)
    with pytest.raises(UserError, match=r"^--time: "):
        submit(time="1:00:00\ntouch PWNED")
    with pytest.raises(UserError, match=r"^--sweep: 1001 runs are more than the 1000"):
        prepare("smoke", [], [f"training.seed={','.join('1' * 1001)}"], {})
    (here / "line\nbreak").mkdir()
    monkeypatch.chdir(here / "line\nbreak")
    with pytest.raises(UserError, match=r"^the working directory: .*line\\nbreak"):
        submit()
    (here / "a,b").mkdir()
    monkeypatch.chdir(here / "a,b")
    with pytest.raises(UserError, match="a container cannot mount"):
        submit(container="image")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('partition: "x\\ntouch PWNED"', r"partition: .*control character"),
        ('sbatch: ["--comment=x\\ntouch PWNED"]', r"sbatch: .*control character"),
        ('environment: {A: "x\\ny"}', None),  # quoted for the shell
        ('environment: {"A=1; touch PWNED; B": x}', r"environment: .* is no name of a variable"),
        ("setup: ['cd /x\n\n  touch y']", None),  # the user's own shell
        ("[" * 100_000, "no YAML"),
        ("time: 2026-13-45", "no YAML"),
        ("[a, b]", ""),
        ("\x00", "no YAML"),
        ("partition: &a [*a]", "partition"),
        ("#" * (1 << 21), "more than 1024 KiB"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_the_sites_file(text, named):
    site(text)
    if named is None:
        assert subprocess.run(["bash", "-n", "-c", submit().script]).returncode == 0
        return
    with pytest.raises(UserError, match=rf"cluster\.yaml: {named}"):
        cluster.load()


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "not ours"])
def test_a_sites_file_that_is_none(kind, tmp_path, monkeypatch):
    path = tmp_path / "site"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path = Path("x" * 5000)
    monkeypatch.setenv("DSV3_CLUSTER", str(path))
    with pytest.raises(UserError, match=r"does not exist, or is no file|cannot be read"):
        cluster.load()


@pytest.mark.parametrize(
    "words", ["--signal=KILL\n41\n", "41 --user=root", "", "\n", "41;42", "\x1b[2J", b"\xff\xfe", "41_x", "4" * 100]
)
def test_a_job_list_that_is_none(here, words):
    """scancel would take options from it."""
    submit().submit()
    path = here / "runs" / "smoke" / "slurm" / "jobs"
    path.write_bytes(words if isinstance(words, bytes) else words.encode())
    for command in (status, cancel):
        with pytest.raises(UserError, match=r"slurm/jobs: (has to be numbers|cannot be read)"):
            command("runs/smoke")
    assert "scancel" not in Path(os.environ["CALLS"]).read_text()


def test_files_of_a_run_directory_that_are_none(here):
    """Status and logs of a directory that others handed on."""
    submit().submit()
    run = here / "runs" / "smoke"
    whole = {"time": "t", "kind": "hang", "text": "\x1b]0;title\x07 rank 1"}
    lines = ["[" * 100_000, "{}", "null", '{"time": 1, "kind": [], "text": {}}', json.dumps(whole), '{"time": "t", "ki']
    (run / "incidents.jsonl").write_bytes(b"\xff\n" + "\n".join(lines).encode())
    (run / "metrics.jsonl").write_text('{"step": 7}\n{"step": "8"}\n{"step": [1]}\n' + "[" * 100_000)
    (run / "state").write_text("\x1b[31mrunning")
    (run / "slurm" / "41.out").write_text("\x1b[2J\x9b31mgone\n")
    assert incidents.read(run) == [whole]
    for command in ("status", "logs"):
        told = CliRunner().invoke(main.app, ["slurm", command, "runs/smoke"], catch_exceptions=False)
        assert told.exit_code == 0
        assert not set(told.output) & {"\x1b", "\x07", "\x9b"}
    assert status("runs/smoke").step == 7
    (run / "state").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"state: cannot be read \(no UTF-8 text\)"):
        status("runs/smoke")


def test_a_number_of_failures_is_no_arithmetic(here):
    """bash computes what stands in brackets of a variable: `a[$(...)]`."""
    submit("faults.max_restarts=2").submit()
    run = here / "runs" / "smoke"
    (run / "slurm" / "failures").write_text("a[$(touch PWNED)] \n")
    environment = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n7", "CODE": "1", "RUN_DIR": str(run)}
    environment |= {"STATE": "failed", "NEWEST": "", "JOB": ""}
    for failures in ("1", "2"):
        subprocess.run(["bash", str(run / "slurm" / "script.sh")], env=environment, capture_output=True)
        assert (run / "slurm" / "failures").read_text() == f"{failures} \n"
    assert not list(here.rglob("PWNED"))


@pytest.mark.parametrize(
    ("program", "says"), [("sbatch", "echo --parsable"), ("squeue", "echo 41"), ("squeue", "printf '\\377'")]
)
def test_answers_of_slurm_that_are_none(here, program, says, monkeypatch):
    job = submit()
    if program == "squeue":
        job.submit()
    (here.parent / "bin" / program).write_text(f"#!/bin/sh\n{says}\n")
    with pytest.raises(UserError, match=rf"^{program}: "):
        job.submit() if program == "sbatch" else status("runs/smoke")
    (here.parent / "bin" / program).write_text("no program")
    monkeypatch.setenv("PATH", str(here.parent / "bin"))
    with pytest.raises(UserError, match=rf"^{program}: cannot be started"):
        job.submit() if program == "sbatch" else status("runs/smoke")


@pytest.mark.parametrize("secret", ["variable", "file", None])
def test_values_of_the_environment_are_for_the_user_alone(here, monkeypatch, secret):
    """On their way through SLURM too, where the job reads a file in which they are values like others."""
    from dsv3_train.recipe.load import load
    from dsv3_train.training.rundir import open_run_dir

    monkeypatch.setenv("SECRET", "swordfish")
    recipe = here / "own.yaml"
    value = "${env:SECRET}" if secret == "variable" else "${env:NOBODY:x}"
    recipe.write_text(f"base: smoke\nname: smoke\ndescription: {value}\n")
    recipe.chmod(0o600 if secret == "file" else 0o644)
    prepare(str(recipe), [], [], {}).submit()
    submitted = here / "runs" / "smoke" / "slurm" / "recipe.yaml"
    open_run_dir(here / "run", load(str(submitted)), "", {})
    for file in (submitted, here / "run" / "recipe.yaml"):
        assert bool(file.stat().st_mode & 0o044) == (secret is None), file
