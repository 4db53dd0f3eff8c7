"""What a training run says of its own overlap every so many steps: bubble, slowest rank, exposed communication."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dsv3_train.profiling.spans import Spans
from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat

if TYPE_CHECKING:
    from dsv3_train.profiling.work import Work

_STRAGGLES = 1.2
"""Times the median rank's computing: from here on the slowest rank is a straggler."""

_Result = TypeVar("_Result")


class Watch:
    """Watches the forward and backward passes of single steps; the others run as if it were not there.

    Per watched step it costs two clock readings per computation (CUDA events on a GPU) and a gather of two numbers per
    rank; of a traced one, rank 0's profiler, so those should be many steps apart.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, trainer: Any) -> None:
        logging = recipe.logging
        self._every = logging.pipeline_interval if recipe.parallel.pipeline > 1 else 0
        self._traced_every = logging.trace_interval
        self._folder = run_dir / "profile"
        self._spans = Spans(trainer)
        self._traced: dict[str, Any] = {}

    def watched(self, compute: Callable[[], _Result], step: int) -> Callable[[], _Result]:
        """`compute`, the passes of a step, recorded or traced if that is this step's turn."""
        if _due(step, self._traced_every) and torch.distributed.get_rank() == 0:
            compute = self._tracing(compute, step)
        if not _due(step, self._every):
            return compute

        def recorded() -> _Result:
            with self._spans.recording():
                return compute()

        return recorded

    def figures(self, step: int) -> dict[str, Any]:
        """Of a step that was watched: `bubble_fraction` (idle part on the rank that idles most, of all pipelines),
        `slowest_rank`, `slowest_over_median` of the time that ranks compute, `straggler` (the slowest rank where that
        is 1.2 or more, else None); of a traced one, `exposed_comm_ms`, `hidden_fraction` and `trace`. Collective.

        Waits within a computation, as for tokens of other ranks, count as computing.
        """
        found, self._traced = self._traced, {}
        if _due(step, self._every):
            found = {**found, **self._pipeline()}
        return found

    def _pipeline(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        spans = self._spans.last()
        window = spans[-1].end - spans[0].start
        busy = sum(span.end - span.start for span in spans)
        # In every schedule a rank both begins and ends the pipeline, so that the longest window is the whole time,
        # and clocks need not agree.
        longest = torch.tensor([window], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(
            longest, torch.distributed.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group()
        )
        mine = torch.stack([torch.full_like(longest, busy), longest])
        everyone = mine.new_empty(torch.distributed.get_world_size(), 2)
        torch.distributed.all_gather_into_tensor(everyone, mine.view(1, 2))
        return summary([tuple(row) for row in everyone.tolist()])

    def _tracing(self, compute: Callable[[], _Result], step: int) -> Callable[[], _Result]:
        def traced() -> _Result:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profiler:
                result = compute()
            self._traced = self._analysed(profiler, step)
            return result

        return traced

    def _analysed(self, profiler: torch.profiler.profile, step: int) -> dict[str, Any]:
        """Keep the trace, and what it says; a run goes on if that fails."""
        from dsv3_train.profiling.classes import table
        from dsv3_train.profiling.ranges import window
        from dsv3_train.profiling.trace import read
        from dsv3_train.profiling.work import works

        path = self._folder / f"step{step:08d}.pt.trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"unfinished-{path.name}")
            heartbeat.mark("writing and reading a trace")
            profiler.export_chrome_trace(str(unfinished))
            os.replace(unfinished, path)
            work = _mine(works([read(path)], table()))
        except Exception as error:  # a full disk, a trace too large for the memory
            warnings.warn(f"step {step}: no trace ({type(error).__name__}: {error})", stacklevel=2)
            return {}
        parts = window(work, work.first, work.last)
        return {
            "exposed_comm_ms": parts["exposed_comm_ms"],
            "hidden_fraction": parts["hidden_fraction"],
            "trace": str(path),
        }


def _mine(found: list[Work]) -> Work:
    """Of the GPUs that a process's trace tells of, the one that it computes on."""
    own = torch.cuda.current_device() if torch.cuda.is_available() else None
    return next((work for work in found if work.device == own), found[0])


def _due(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0


def summary(ranks: list[tuple[float, ...]]) -> dict[str, Any]:
    """Bubble and slowest rank from (time computing, time of its pipeline) of every rank."""
    busy = [computing for computing, _ in ranks]
    slowest = max(range(len(busy)), key=busy.__getitem__)
    ratio = busy[slowest] / median(busy)
    return {
        "bubble_fraction": max(1 - computing / whole for computing, whole in ranks),
        "slowest_rank": slowest,
        "slowest_over_median": ratio,
        "straggler": slowest if ratio >= _STRAGGLES else None,
    }
