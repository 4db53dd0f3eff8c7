"""Worker processes for files: started fresh, single-threaded, gone when the process that started them is."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from typing import TypeVar

_T = TypeVar("_T")


def start_worker() -> None:
    """Make this worker process single-threaded, leave Ctrl-C to the process that started it, and end with that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Executor | None]:
    """Worker processes, started fresh so that they hold none of this one's memory; None: work in this one."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def each(executor: Executor | None, function: Callable[..., _T], tasks: Iterable[tuple]) -> Iterator[tuple[int, _T]]:
    """(task number, result) as they finish."""
    if executor is None:
        for number, task in enumerate(tasks):
            yield number, function(*task)
        return
    futures: dict[Future, int] = {executor.submit(function, *task): number for number, task in enumerate(tasks)}
    for future in as_completed(futures):
        yield futures[future], future.result()
