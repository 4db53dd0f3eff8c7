"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dsv3_train.errors import UserError


def write(path: Path, content: str | bytes) -> None:
    """Under a temporary name, then renamed; folders are made.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from None
