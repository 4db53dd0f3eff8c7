"""Runs a schedule on Megatron-core's model chunks, behind its `forward_backward_func` interface."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor, forward_step
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from dsv3_train.model import weight_gradients
from dsv3_train.model.stage import Place
from dsv3_train.pipeline.generate import build, forward_only, whole_backwards
from dsv3_train.pipeline.messages import Messages
from dsv3_train.pipeline.operations import Compute, Exchange, Message, Op, Schedule
from dsv3_train.pipeline.pairs import Pairs
from dsv3_train.pipeline.timeline import Timeline
from dsv3_train.runtime import heartbeat, megatron_versions

_backward_step = megatron_versions.backward_step()

_Key = tuple[int, int, int]
"""Direction, stage, micro-batch."""


class Executor:
    """Megatron-core's `forward_backward_func` for the schedules of `pipeline/generate.py`.

    Args:
        kind: of the schedule.
        places: of this rank's chunks, in the order of the model list.
        messages: to and from the other ranks of the pipeline.
        defer: compute weight gradients where the schedule says W.
        overlap: run F&B pairs through Megatron-core's schedule plan.
    """

    def __init__(self, kind: str, places: Sequence[Place], messages: Messages, *, defer: bool, overlap: bool) -> None:
        self.kind, self.places, self.messages = kind, list(places), messages
        self.defer, self.overlap = defer, overlap
        self.timeline = Timeline()
        """Of the last call."""
        self.paired = 0
        """F&B pairs that the last call ran through the schedule plan."""
        self.schedule = lru_cache(maxsize=8)(self._schedule)

    def _schedule(self, micro_batches: int, evaluation: bool) -> Schedule:
        schedule = build(self.kind, parallel_state.get_pipeline_model_parallel_world_size(), micro_batches)
        if evaluation:
            return forward_only(schedule)
        return schedule if self.defer else whole_backwards(schedule)

    def __call__(
        self,
        *,
        forward_step_func: Callable,
        data_iterator: Sequence[Iterator | None],
        model: Sequence[DistributedDataParallel],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        force_all_reduce: bool = False,
        **_unused: Any,
    ) -> list:
        """One global batch; what the loss function reported, per micro-batch, where this rank has a last stage.

        Args:
            data_iterator: one per chunk, each over the micro-batches of that chunk's direction.
            num_microbatches: of this data-parallel rank, both directions together.
        """
        config: TransformerConfig = get_model_config(model[0])
        self.timeline, self.paired = Timeline(), 0
        run = _Batch(
            self,
            self.schedule(num_microbatches, forward_only),
            forward_step_func,
            data_iterator,
            model,
            self._shape(config, seq_length, micro_batch_size),
            evaluation=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )
        run.execute()
        run.pairs = None  # or the two would keep each other, and the step's tokens, until Python collects
        if not forward_only and config.finalize_model_grads_func is not None:
            tokens = None
            if config.calculate_per_token_loss:
                # Megatron then broadcasts from the last rank, where the V has none of them.
                torch.distributed.all_reduce(run.tokens, group=parallel_state.get_pipeline_model_parallel_group())
                tokens = run.tokens
            config.finalize_model_grads_func(list(model), tokens, force_all_reduce=force_all_reduce)
        return run.reported

    @staticmethod
    def _shape(config: TransformerConfig, sequence_length: int, micro_batch_size: int) -> tuple[int, int, int]:
        """[s, b, h] of what stages hand on."""
        shared = parallel_state.get_context_parallel_world_size()
        if config.sequence_parallel:
            shared *= parallel_state.get_tensor_model_parallel_world_size()
        return sequence_length // shared, micro_batch_size, config.hidden_size


class _Batch:
    """One global batch on one rank."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        forward_step_func: Callable,
        iterators: Sequence[Iterator | None],
        model: Sequence[DistributedDataParallel],
        shape: tuple[int, int, int],
        *,
        evaluation: bool,
        collect_non_loss_data: bool,
    ) -> None:
        self.executor, self.messages, self.schedule = executor, executor.messages, schedule
        self.step, self.iterators, self.model, self.shape = forward_step_func, iterators, model, shape
        self.evaluation, self.collect_non_loss_data = evaluation, collect_non_loss_data
        self.config: TransformerConfig = get_model_config(model[0])
        self.chunk = {(place.direction, place.stage): i for i, place in enumerate(executor.places)}
        # Each direction of dualpipe has half of the micro-batches and is averaged with the other by data parallelism,
        # so that its losses count over half their number, odd ones included.
        self.averaged_over = sum(schedule.micro_batches) / len(schedule.micro_batches)
        self.events = schedule.events[parallel_state.get_pipeline_model_parallel_rank()]
        exchanges = [event for event in self.events if isinstance(event, Exchange)]
        self.sent = {t.message for exchange in exchanges for t in exchange.transfers if t.sends}
        self.inputs: dict[_Key, torch.Tensor | None] = {}
        self.outputs: dict[_Key, torch.Tensor] = {}
        self.handed: dict[Message, torch.Tensor] = {}
        """From one of this rank's chunks to the other, where the V turns."""
        self.outgoing: dict[Message, torch.Tensor] = {}
        self.reported: list = []
        self.tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        self.pairs = Pairs(self) if executor.overlap and not evaluation else None
        self.remaining: Counter[int] = Counter()
        """Backward operations that each chunk still has before its gradients are reduced."""

    def execute(self) -> None:
        """Every event of this rank in order."""
        with contextlib.ExitStack() as unsynchronised:
            self._hold_reductions(unsynchronised)
            for event in self.events:
                if isinstance(event, Exchange):
                    self.messages.post(event.transfers, self.outgoing, self.shape)
                    continue
                heartbeat.mark(" & ".join(map(str, event.ops)))
                # Waits for what has to arrive stay out of the operation's time.
                ready = [(op, self._await(op)) for op in event.ops]
                with self.executor.timeline.span(event.ops):
                    self._compute(ready)
                self._reduce_finished(event.ops)
        self.messages.finish()
        left = [*self.inputs, *self.outputs, *self.handed, *self.outgoing, *weight_gradients.pending()]
        if left:
            raise RuntimeError(f"the schedule {self.schedule.kind} left these unused: {left}")

    def _await(self, op: Op) -> torch.Tensor | None:
        """What an operation works on: the activation before a forward, the gradient after a backward."""
        place = self.executor.places[self.chunk[op.direction, op.stage]]
        if op.kind == "W" or (place.first if op.kind == "F" else place.last):
            return None
        if op.kind == "F":
            message = Message("F", op.direction, op.stage - 1, op.micro_batch)
        else:
            message = Message("B", op.direction, op.stage + 1, op.micro_batch)
        return self.handed.pop(message) if message in self.handed else self.messages.take(message)

    def _compute(self, ready: list[tuple[Op, torch.Tensor | None]]) -> None:
        if self.pairs is not None and ready[0][0].kind != "W":
            self.pairs.run(ready)
            return
        for op, tensor in ready:
            if op.kind == "F":
                self._forward(op, tensor)
            elif op.kind == "W":
                self._weights(op)
            else:
                self._backward(op, tensor)

    def _forward(self, op: Op, activation: torch.Tensor | None) -> None:
        index = self.chunk[op.direction, op.stage]
        place = self.executor.places[index]
        if activation is not None and not self.evaluation:
            activation.requires_grad_()
        output, tokens = forward_step(
            self.step,
            self.iterators[index],
            self.model[index],
            self.averaged_over,
            activation,
            self.reported,
            self.config,
            parallel_state.get_context_parallel_world_size(),
            self.collect_non_loss_data,
            is_first_microbatch=op.micro_batch == 0,
            current_microbatch=op.micro_batch,
            is_last_stage=place.last,
        )
        self.forwarded(op, activation, output, tokens)

    def forwarded(self, op: Op, activation: torch.Tensor | None, output: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep what the backward needs, and hand the output on."""
        self.tokens += tokens
        if not self.evaluation:
            self.inputs[op[1:]] = activation
            self.outputs[op[1:]] = output
        if not self.executor.places[self.chunk[op.direction, op.stage]].last:
            self._hand_on(Message("F", *op[1:]), output.detach())
            if not self.evaluation:
                # The alias that is handed on keeps the storage; of this one only the graph is needed from here on.
                deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)

    def _hand_on(self, message: Message, tensor: torch.Tensor) -> None:
        (self.outgoing if message in self.sent else self.handed)[message] = tensor

    def _backward(self, op: Op, gradient: torch.Tensor | None) -> None:
        key = op[1:]
        with weight_gradients.deferred(key) if op.kind == "I" else contextlib.nullcontext():
            input_gradient = _backward_step(self.inputs.pop(key), self.outputs.pop(key), gradient, self.config)
        if op.kind == "B":
            for layer in weight_gradients.te_layers(self.model[self.chunk[op.direction, op.stage]]):
                layer.backward_dw()
        self.backwarded(op, input_gradient)

    def backwarded(self, op: Op, input_gradient: torch.Tensor | None) -> None:
        """Hand the gradient of a stage's input back to the stage before."""
        if input_gradient is not None:
            self._hand_on(Message("B", *op[1:]), input_gradient)

    def _weights(self, op: Op) -> None:
        weight_gradients.compute(op[1:])
        if self.pairs is not None:
            self.pairs.weights(op)
            return
        for layer in weight_gradients.te_layers(self.model[self.chunk[op.direction, op.stage]]):
            layer.backward_dw()

    def _hold_reductions(self, until: contextlib.ExitStack) -> None:
        """Megatron's hooks would reduce a bucket after its first backward pass; here, after a chunk's last."""
        if self.evaluation or self.config.no_sync_func is None:
            return
        for chunk in self.model:
            until.enter_context(chunk.no_sync())
        computed = [op for event in self.events if isinstance(event, Compute) for op in event.ops if op.kind in "BIW"]
        self.remaining = Counter(self.chunk[op.direction, op.stage] for op in computed)

    def _reduce_finished(self, ops: Sequence[Op]) -> None:
        for op in ops if self.remaining else ():
            if op.kind in "BIW":
                index = self.chunk[op.direction, op.stage]
                self.remaining[index] -= 1
                if self.remaining[index] == 0:
                    self.model[index].start_grad_sync()
