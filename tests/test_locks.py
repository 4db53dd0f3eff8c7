"""One process at a time in a directory: on NFS, and on file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from dsv3_train import locks
from dsv3_train.errors import UserError


@pytest.fixture
def nfs(monkeypatch):
    """What is removed while this process has it open stays, under another name, as on NFS."""
    plain = os.unlink

    def unlink(path, *, dir_fd=None):
        place = Path(os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ".", path).absolute()
        opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        if str(place) in opened and not place.name.startswith(".nfs"):
            place.rename(place.with_name(f".nfs{place.name}"))
        else:
            plain(place)

    monkeypatch.setattr(os, "unlink", unlink)


def hold(directory: Path) -> locks.Held:
    return locks.hold(directory, "lock", {"lock", "file", "more/", "more/file"}.__contains__, "move it away")


def test_a_directory_and_its_lock_are_removed(nfs, tmp_path):
    held = hold(tmp_path / "above" / "x.parts")
    (held.path / "more").mkdir()
    (held.path / "more" / "file").write_text("words")
    (held.path / "file").write_text("words")
    held.clear()
    assert not held.path.exists()
    held.undo()
    assert not (tmp_path / "above").exists()


def test_what_comes_meanwhile_stays(tmp_path):
    held = hold(tmp_path / "x.parts")
    (held.path / "more").mkdir()
    (held.path / "more" / "thesis").write_text("words")
    held.clear()
    assert (held.path / "more" / "thesis").read_text() == "words"


@pytest.mark.parametrize("case", ["a file", "a file in a folder", "a link", "no lock", "it is a link", "it is a file"])
def test_what_is_not_ours_is_refused(tmp_path, case):
    directory, elsewhere = tmp_path / "x.parts", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("years of work")
    if case == "it is a link":
        directory.symlink_to(elsewhere)
    elif case == "it is a file":
        directory.write_text("words")
    else:
        (directory / "more").mkdir(parents=True)
        (directory / "lock").touch()
        if case == "a link":
            (directory / "file").symlink_to(elsewhere / "file")
        elif case == "no lock":
            (directory / "lock").unlink()
        else:
            (directory / ("more" if "folder" in case else "") / "thesis").write_text("words")
    before = sorted(directory.rglob("*")) if directory.is_dir() else directory.read_text()
    with pytest.raises(UserError, match="move it away"):
        hold(directory)
    assert before == (sorted(directory.rglob("*")) if directory.is_dir() else directory.read_text())
    assert (elsewhere / "file").read_text() == "years of work"


def test_an_empty_directory_that_was_there_stays(tmp_path):
    (tmp_path / "x.parts").mkdir()
    held = hold(tmp_path / "x.parts")
    held.clear()
    assert list(tmp_path.iterdir()) == [tmp_path / "x.parts"]


def test_taken_up_again(tmp_path):
    first = hold(tmp_path / "x.parts")
    (first.path / "file").write_text("words")
    with pytest.raises(locks.Busy):
        hold(tmp_path / "x.parts")
    first.lock.close()
    again = hold(tmp_path / "x.parts")
    again.clear()
    assert not again.path.exists()


def test_another_one_is_kept_out(tmp_path):
    with (tmp_path / "lock").open("w") as ours, (tmp_path / "lock").open("w") as theirs:
        assert locks.alone(ours)
        assert not locks.alone(theirs)


def test_without_locks_all_are_alone(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (tmp_path / "lock").open("w") as lock:
        assert locks.alone(lock)
