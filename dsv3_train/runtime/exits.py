"""Exit codes of a rank, and of a run as a whole, beyond 0, 1 (a crash) and 2 (bad input)."""

from __future__ import annotations

import multiprocessing.util
import os
import sys
from contextlib import suppress
from typing import NoReturn

PREEMPTED = 75
"""Asked to stop, and stopped with a checkpoint: start again to go on (EX_TEMPFAIL of sysexits.h). SLURM requeues."""
HUNG = 70
"""No progress within `faults.hang_seconds`: ended by the watchdog."""
CORRUPT = 74
"""Results differ that must be the same bit for bit: a machine computes wrongly."""

FINAL = (0, 2, PREEMPTED)
"""After these, starting again at once would be wrong or in vain."""


def leave(code: int | str | None) -> NoReturn:
    """End this process where its process groups may be alive, with a code as `sys.exit` takes it.

    Not through the interpreter's own end: a thread of gloo that drops a tensor there asks for the interpreter's lock,
    and the process ends by SIGABRT in place of its exit code (seen once in some hundred runs).
    """
    # os._exit skips this, and a data worker would be left behind.
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
    os._exit(code if isinstance(code, int) else int(code is not None))
