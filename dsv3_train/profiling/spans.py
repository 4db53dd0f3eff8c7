"""When Megatron-core's own schedules (1f1b, interleaved, no pipeline) run their forwards and backwards."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.pipeline_parallel import combined_1f1b, schedules

from dsv3_train.model.stage import Place
from dsv3_train.pipeline.executor import Executor
from dsv3_train.pipeline.operations import Op
from dsv3_train.pipeline.simulate import Span
from dsv3_train.pipeline.timeline import Timeline


class MegatronTimeline:
    """Records what Megatron-core's schedules call for every forward and backward, with two clock readings each.

    They look `forward_step` and `backward_step`, and of overlapped pairs `combined_forward_backward_step`, up in their
    modules at every call, which is where these are wrapped; tests/distributed/test_profile_run.py fails if they stop
    doing so.
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
        wrapped = (
            (schedules, "forward_step", self._wrapped_forward),
            (schedules, "backward_step", self._wrapped_backward),
            (combined_1f1b, "combined_forward_backward_step", self._wrapped_pair),
        )
        plain = [getattr(module, name) for module, name, _ in wrapped]
        for (module, name, wrap), function in zip(wrapped, plain, strict=True):
            setattr(module, name, wrap(function))
        try:
            yield self
        finally:
            for (module, name, _), function in zip(wrapped, plain, strict=True):
                setattr(module, name, function)

    def _forward(self, model: Any) -> Op:
        """The next of a chunk."""
        stage = self._place[id(model)].stage
        self._forwards[stage] += 1
        return Op("F", 0, stage, self._forwards[stage] - 1)

    def _backward(self, output: Any) -> Op:
        """That of the forward which made `output`."""
        return self._of_output.pop(id(_tensor(output)))._replace(kind="B")

    def _wrapped_forward(self, forward: Callable) -> Callable:
        def recorded(step: Callable, iterator: Any, model: Any, *arguments: Any, **options: Any) -> Any:
            op = self._forward(model)
            with self.timeline.span((op,)):
                result = forward(step, iterator, model, *arguments, **options)
            self._of_output[id(_tensor(result[0]))] = op
            return result

        return recorded

    def _wrapped_backward(self, backward: Callable) -> Callable:
        def recorded(inputs: Any, output: Any, *arguments: Any) -> Any:
            with self.timeline.span((self._backward(output),)):
                return backward(inputs, output, *arguments)

        return recorded

    def _wrapped_pair(self, combined: Callable) -> Callable:
        parameters = inspect.signature(combined)

        def recorded(*arguments: Any, **options: Any) -> Any:
            call = parameters.bind(*arguments, **options)
            given = call.arguments
            for name in ("pre_forward", "pre_backward"):  # they wait for what has to arrive, which is no computation
                if (wait := given.pop(name, None)) is not None:
                    wait()
            forward = None if given["f_model"] is None else self._forward(given["f_model"])
            backward = None if given["b_model"] is None else self._backward(given["b_output_tensor"])
            with self.timeline.span(tuple(op for op in (forward, backward) if op is not None)):
                result = combined(*call.args, **call.kwargs)
            if forward is not None:
                self._of_output[id(_tensor(result[0]))] = forward
            return result

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
