"""A forward and a backward pass whose kernels overlap, through Megatron-core's schedule plan.

The plan runs attention, dispatch, experts and combine of one micro-batch against those of another, communication on a
stream of its own (report, section 3.2.1, figure 4). State between a forward and its backward rides on the plan, so
once pairs overlap, operations that stand alone go through it too.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.pipeline_parallel.combined_1f1b import combined_forward_backward_step
from megatron.core.pipeline_parallel.utils import set_streams

from dsv3_train.model import weight_gradients
from dsv3_train.pipeline.operations import Op
from dsv3_train.runtime.megatron_versions import attention_node

if TYPE_CHECKING:
    from dsv3_train.pipeline.executor import _Batch


class Pairs:
    """The plan's side of one global batch."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch
        self._deferred: dict[tuple[int, ...], list] = {}
        set_streams()

    def run(self, ready: list[tuple[Op, torch.Tensor | None]]) -> None:
        """A forward, a backward (B or I), or one of each; with each the tensor that it works on."""
        forward = next(((op, x) for op, x in ready if op.kind == "F"), None)
        backward = next(((op, x) for op, x in ready if op.kind in "BI"), None)
        later: Hashable = None
        batch, executor = self.batch, self.batch.executor
        f_arguments: dict = {"f_model": None, "data_iterator": None, "input_tensor": None}
        b_arguments: dict = dict.fromkeys(("b_model", "b_input_tensor", "b_output_tensor", "b_output_tensor_grad"))
        view = executor.places[0]
        if forward is not None:
            op, activation = forward
            index = batch.chunk[op.direction, op.stage]
            view = executor.places[index]
            if activation is not None:
                activation.requires_grad_()
            f_arguments = {
                "f_model": batch.model[index],
                "data_iterator": batch.iterators[index],
                "input_tensor": activation,
                "f_model_chunk_id": view.virtual,
                "is_first_microbatch": op.micro_batch == 0,
                "current_microbatch": op.micro_batch,
            }
        if backward is not None:
            op, gradient = backward
            output = batch.outputs.pop(op[1:])
            if op.kind == "I":
                self._defer(op, output)
                later = op[1:]
            b_arguments = {
                "b_model": batch.model[batch.chunk[op.direction, op.stage]],
                "b_input_tensor": batch.inputs.pop(op[1:]),
                "b_output_tensor": output,
                "b_output_tensor_grad": gradient,
            }
        executor.paired += forward is not None and backward is not None
        # The plan asks Megatron's global state whether the forward chunk is the last stage.
        with view.view(), weight_gradients.deferred(later):
            output, tokens, input_gradient = combined_forward_backward_step(
                batch.step,
                num_microbatches=batch.averaged_over,
                forward_data_store=batch.reported,
                config=batch.config,
                collect_non_loss_data=batch.collect_non_loss_data,
                **f_arguments,
                **b_arguments,
            )
        if forward is not None:
            batch.forwarded(*forward, output, tokens)
        if backward is not None:
            batch.backwarded(backward[0], input_gradient)

    def _defer(self, op: Op, output: Any) -> None:
        """Let the plan's nodes of a backward keep their weight gradients (of Transformer Engine's layers) for W."""
        plan = output.schedule_plan
        nodes = [node for layer in plan._transformer_layers for node in (attention_node(layer), layer.mlp)]
        self._deferred[op[1:]] = [node.backward_dw for node in reversed(nodes)]
        for node in nodes:
            node.backward_dw = _nothing

    def weights(self, op: Op) -> None:
        """The weight gradients that an I left."""
        for product in self._deferred.pop(op[1:]):
            product()


def _nothing() -> None:
    pass
