"""One process at a time in a directory: on NFS, and on file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from dsv3_train import locks


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


def test_a_directory_and_its_lock_are_removed(nfs, tmp_path):
    directory = tmp_path / "x.parts"
    (directory / "more").mkdir(parents=True)
    (directory / "more" / "file").write_text("words")
    (directory / "file").write_text("words")
    with (directory / "lock").open("w") as lock:
        assert locks.alone(lock)
        locks.remove(directory, lock)
    assert not directory.exists()


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
