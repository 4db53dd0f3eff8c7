"""PREFIX.parts, where a dataset is made: ours alone, so that what somebody else keeps under that name stays."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dsv3_train import locks
from dsv3_train.errors import UserError

_OURS = re.compile(
    r"lock|given\.[a-z_]+\.(json|jinja)|published(_config)?\.json|manifest\.json|merged\.(bin|idx)|trained\.tmp|"
    r"trained-[0-9a-f]{32}-\d+\.json|\d{6,}\.(bin|npy|json|tmp)"
)
"""Every name that `prepare` gives in it."""


class BeingPrepared(UserError):
    """By another process, at this moment."""


@contextlib.contextmanager
def directory(prefix: str) -> Iterator[Path]:
    """PREFIX.parts, locked; removed at the end and after a fault of the input, kept for a run that was cut short.

    Raises:
        UserError: something else has that name, or it cannot be written.
        BeingPrepared: another process is in it.
    """
    parts = Path(f"{prefix}.parts")
    above = _missing_above(parts)
    try:
        parts.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            parts.mkdir()
            above.insert(0, parts)
        _refuse_foreign(parts)
        begun = (parts / "lock").exists()
        lock_file = os.open(parts / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        raise BeingPrepared(f"{parts}: another process has just prepared this dataset; start again") from None
    except OSError as error:
        _remove_empty(above)
        raise UserError(f"{prefix}: cannot be written ({error.strerror}); choose another output") from None
    ours = begun or parts in above
    with open(lock_file, "w") as lock:
        if not locks.alone(lock):
            raise BeingPrepared(f"{parts}: another process is preparing this dataset; wait for it")
        try:
            yield parts
        except BaseException as error:
            if isinstance(error, UserError) or not any(parts.glob("*.json")):
                _clear(parts, lock, ours)
                _remove_empty(above)
            raise
        _clear(parts, lock, ours)


def left(prefix: str) -> bool:
    """Whether a run of ours that was cut short has left its parts."""
    parts = Path(f"{prefix}.parts")
    return parts.is_dir() and not parts.is_symlink() and (parts / "lock").is_file()


def _refuse_foreign(parts: Path) -> None:
    remedy = "move it away, or choose another output"
    if not stat.S_ISDIR(os.lstat(parts).st_mode):
        raise UserError(f"{parts}: is in the way, and no directory of ours; {remedy}")
    for entry in os.scandir(parts):
        if not (_OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            raise UserError(f"{parts}: holds {entry.name}, so it is not ours to use and delete; {remedy}")


def _clear(parts: Path, lock: IO, ours: bool) -> None:
    """Remove our files, and the directory unless it was there before us or holds something else.

    The lock last, and closed: NFS keeps an open file there under another name.
    """
    for path in parts.iterdir():
        if _OURS.fullmatch(path.name) and path.name != "lock":
            path.unlink()
    lock.close()
    with contextlib.suppress(OSError):
        (parts / "lock").unlink()
        if ours:
            parts.rmdir()


def _missing_above(path: Path) -> list[Path]:
    """The directories above `path` that are not there yet, the lowest first."""
    return [above for above in path.parents if not above.exists()]


def _remove_empty(directories: list[Path]) -> None:
    """Undo what was made, so that a refusal leaves nothing."""
    for one in directories:
        with contextlib.suppress(OSError):
            one.rmdir()
