"""Conversions killed before each rename and unlink: never half of a target, and the next run ends it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from fuzz_checkpoints import back, made, read, same, there

NAMES = ("rename", "replace", "unlink", "rmdir")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made(folder / "hf", True, 2, 0)
    there(folder / "hf", folder / "run")
    return {"hf": folder / "hf", "run": folder / "run"}


def killed_before(number: int, work) -> bool:
    """Whether a process that does `work` was killed before its call `number` of those that change names."""

    def work_until_killed() -> None:
        left = [number]

        def counted(plain):
            def call(*arguments, **more):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return plain(*arguments, **more)

            return call

        for name in NAMES:
            setattr(os, name, counted(getattr(os, name)))
        work()

    process = multiprocessing.get_context("fork").Process(target=work_until_killed)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in", "out"])
def test_killed_at_every_name(bases, tmp_path, way):
    def work(target: Path) -> None:
        there(bases["hf"], target) if way == "in" else back(bases["run"], target)

    number = 0
    while killed_before(number, lambda: work(tmp_path / "target")):
        target = tmp_path / "target"
        if not target.exists():
            work(target)
        out = target
        if way == "in":
            out = tmp_path / "back"
            back(target, out)
        same(read(bases["hf"]), read(out))
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".unfinished")] == []
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        number += 1
    assert number >= 10
