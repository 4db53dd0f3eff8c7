"""Where checkpoints lie, and which is the newest. No torch here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dsv3_train import whole
from dsv3_train.errors import UserError

_STEP = re.compile(r"step_(\d{8,})")
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"
_REPLACED = ".replaced"
_DAMAGED_KEPT = 2
"""Of those set aside, the newest: enough to look into, and no disk is filled by a disk that fails."""


def step_path(root: Path, step: int) -> Path:
    """`root/step_00000040`."""
    return root / f"step_{step:08d}"


def complete(root: Path) -> list[Path]:
    """The whole checkpoints under `root`, oldest first; one being written has another name."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name) and (path / "metadata.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run directory or `checkpoints` folder.

    Raises:
        UserError: there is none.
    """
    if (path / "metadata.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        if complete(root):
            return complete(root)[-1]
    raise UserError(f"{path}: no checkpoint here; give a run directory, or one of its checkpoints/step_*")


def damaged(root: Path) -> list[Path]:
    """What `set_aside` left under `root`, newest first."""
    return sorted(_left(root, DAMAGED), reverse=True)


def set_aside(path: Path) -> None:
    """Rename a checkpoint that must not be resumed from (`path` with `DAMAGED`); of all of them the newest two stay."""
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    for old in damaged(path.parent)[_DAMAGED_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def discard_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run went back to before them."""
    for path in complete(root):
        if int(path.name.split("_")[1]) > step:
            _delete(path)


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what was left of others."""
    for path in complete(root)[:-keep_last]:
        _delete(path)
    sweep(root)


def sweep(root: Path) -> None:
    """Delete what saves and deletions left that were cut short. Not while a save is under way."""
    for left in _left(root, _REPLACED):
        path = left.with_name(left.name.removesuffix(_REPLACED))
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:  # `finish` had not yet given its successor the name
            left.rename(path)
    for left in _left(root, UNFINISHED):
        shutil.rmtree(left, ignore_errors=True)


def _left(root: Path, suffix: str) -> list[Path]:
    """What has the name of a checkpoint and `suffix`; folders of other names are somebody else's."""
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if re.fullmatch(_STEP.pattern + re.escape(suffix), path.name)]


def finish(unfinished: Path, path: Path) -> None:
    """Give what is written its name, in place of one of the same step: the run resumed from an earlier one.

    Files that were written are on the disk itself; here their names are put there, and the new name after them: a power
    loss leaves the old one or the new one.
    """
    whole.sync(unfinished)
    replaced = path.with_name(path.name + _REPLACED)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.rename(path)
    for above in (path.parent, path.parent.parent):
        whole.sync(above)
    shutil.rmtree(replaced, ignore_errors=True)


def _delete(path: Path) -> None:
    doomed = path.with_name(path.name + UNFINISHED)  # renamed first: half a checkpoint is never taken for one
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    whole.sync(path.parent)
    shutil.rmtree(doomed)
