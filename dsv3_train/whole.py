"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dsv3_train.errors import UserError


def write(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Under a temporary name, then renamed; folders are made.

    Args:
        mode: permissions, of which the umask takes away.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            partial.unlink()  # of a process that was killed; or somebody's link
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from None
