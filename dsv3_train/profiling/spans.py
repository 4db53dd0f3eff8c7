"""When Megatron-core's own schedules (1f1b, interleaved, no pipeline) run their forwards and backwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.pipeline_parallel import schedules

from dsv3_train.model.stage import Place
from dsv3_train.pipeline.executor import Executor
from dsv3_train.pipeline.operations import Op
from dsv3_train.pipeline.simulate import Span
from dsv3_train.pipeline.timeline import Timeline


class MegatronTimeline:
    """Records what Megatron-core's schedules call for every forward and backward, with two clock readings each.

    They look `forward_step` and `backward_step` up in their module at every call, which is where the two are wrapped;
    tests/distributed/test_profile_run.py fails if they stop doing so.
    """

    def __init__(self, chunks: Sequence[Any], places: Sequence[Place]) -> None:
        self._place = {id(chunk): place for chunk, place in zip(chunks, places, strict=True)}
        self.timeline = Timeline()
        self._forwards: Counter[int] = Counter()
        self._of_output: dict[int, Op] = {}

    def clear(self) -> None:
        """A global batch begins."""
        self.timeline = Timeline()
        self._forwards.clear()
        self._of_output.clear()

    @contextmanager
    def installed(self) -> Iterator[MegatronTimeline]:
        """Record until the end."""
        forward, backward = schedules.forward_step, schedules.backward_step
        schedules.forward_step, schedules.backward_step = (
            self._wrapped_forward(forward),
            self._wrapped_backward(backward),
        )
        try:
            yield self
        finally:
            schedules.forward_step, schedules.backward_step = forward, backward

    def _wrapped_forward(self, forward: Callable) -> Callable:
        def recorded(step: Callable, iterator: Any, model: Any, *arguments: Any, **options: Any) -> Any:
            place = self._place[id(model)]
            op = Op("F", 0, place.stage, self._forwards[place.stage])
            self._forwards[place.stage] += 1
            with self.timeline.span((op,)):
                result = forward(step, iterator, model, *arguments, **options)
            self._of_output[id(_tensor(result[0]))] = op
            return result

        return recorded

    def _wrapped_backward(self, backward: Callable) -> Callable:
        def recorded(inputs: Any, output: Any, *arguments: Any) -> Any:
            op = self._of_output.pop(id(_tensor(output)))
            with self.timeline.span((op._replace(kind="B"),)):
                return backward(inputs, output, *arguments)

        return recorded


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, list) else output


class Spans:
    """The computations of one rank's last global batch, whoever runs its schedule."""

    def __init__(self, trainer: Any) -> None:
        self._executor: Executor | None = trainer.executor
        self._megatron: MegatronTimeline | None = None
        if self._executor is None:
            self._megatron = MegatronTimeline(trainer.chunks, [model.place for model in trainer.models])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One global batch runs within."""
        if self._megatron is None:
            yield
            return
        self._megatron.clear()
        with self._megatron.installed():
            yield

    def last(self) -> tuple[Span, ...]:
        """Of the last global batch, in seconds on this process's `perf_counter`. Waits for the device."""
        timeline = self._executor.timeline if self._executor is not None else self._megatron.timeline  # type: ignore
        return timeline.spans()
