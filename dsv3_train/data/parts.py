"""PREFIX.parts, where a dataset is made: ours alone, so that what somebody else keeps under that name stays."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

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
    try:
        held = locks.hold(parts, "lock", _ours, "move it away, or choose another output")
    except locks.Busy:
        raise BeingPrepared(f"{parts}: another process is preparing this dataset; wait for it") from None
    except FileNotFoundError:
        raise BeingPrepared(f"{parts}: another process has just prepared this dataset; start again") from None
    except OSError as error:
        raise UserError(f"{prefix}: cannot be written ({error.strerror}); choose another output") from None
    with held.lock:
        try:
            yield parts
        except BaseException as error:
            if isinstance(error, UserError) or not any(parts.glob("*.json")):
                held.clear()
                held.undo()
            raise
        held.clear()


def left(prefix: str) -> bool:
    """Whether a run of ours that was cut short has left its parts."""
    parts = Path(f"{prefix}.parts")
    return parts.is_dir() and not parts.is_symlink() and (parts / "lock").is_file()


def _ours(relative: str) -> bool:
    return _OURS.fullmatch(relative) is not None
