"""A micro-batch's forward and backward pass as one CUDA graph, replayed for every micro-batch.

Launching the kernels of a small model takes the host longer than the GPU takes to run them. A graph is launched at
once. It holds what was recorded: addresses, shapes and numbers of the host. So batches are copied into its inputs, and
what changes over a run (the number of micro-batches that losses are averaged over, the weight of MTP's loss) is read
from tensors.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_step
from megatron.core.utils import get_model_config

from dsv3_train.recipe.schema import Recipe
from dsv3_train.runtime import heartbeat, megatron_versions

_backward_step = megatron_versions.backward_step()


def why_not(recipe: Recipe, device: str, models: Sequence[torch.nn.Module]) -> str | None:
    """Why the micro-batches of a run cannot be a graph; None: they can."""
    parallel = recipe.parallel
    if device != "cuda":
        return "there is no GPU"
    if not recipe.runtime.cuda_graph:
        return "runtime.cuda_graph is false"
    if parallel.pipeline > 1 or recipe.overlaps_pairs:
        return "a pipeline's operations are run one by one"
    if parallel.tensor > 1 or parallel.context > 1 or parallel.overlap_param_gather:
        return "ranks exchange tensors within a micro-batch"
    if recipe.precision.fp8 != "none":
        return "Transformer Engine's FP8 experts take their counts from the host"
    from dsv3_train.model import resident_experts  # Triton is not everywhere

    if not all(map(resident_experts.counts_stay_on_gpu, models)):
        return "experts take their counts from the host"
    return None


class MicroBatchGraph:
    """Megatron-core's `forward_backward_func` for a model in one stage.

    The first call runs as ever, which compiles and chooses kernels. The second records, and from then on calls replay.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, torch.Tensor] = {}
        self._reported: list[dict[str, torch.Tensor]] = []
        self._micro_batches, self._mtp_weight = torch.ones(2, device="cuda").unbind()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work on the stream of the graph.

        autograd adds a parameter's gradient on the stream on which its node was made. Megatron-core's data-parallel
        wrapper makes the nodes and keeps them, so it has to be built here, or recording a backward pass fails.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def __call__(
        self,
        *,
        forward_step_func: Callable,
        data_iterator: Iterator[dict[str, torch.Tensor]],
        model: DistributedDataParallel,
        num_microbatches: int,
        forward_only: bool = False,
        **options: Any,
    ) -> list:
        """One global batch; what the loss function reported, per micro-batch."""
        if forward_only or not self._warm:
            self._warm |= not forward_only
            with self.on_stream():
                return get_forward_backward_func()(
                    forward_step_func=forward_step_func,
                    data_iterator=data_iterator,
                    model=model,
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    **options,
                )
        config = get_model_config(model)
        reported = []
        with self.on_stream():
            self._micro_batches.fill_(num_microbatches)
            self._mtp_weight.fill_(config.mtp_loss_scaling_factor or 0.0)
            for _ in range(num_microbatches):
                heartbeat.mark("a micro-batch")
                self._replay(forward_step_func, next(data_iterator), model)
                reported.append({name: value.clone() for name, value in self._reported[0].items()})
            if config.no_sync_func is not None:  # reductions overlap, and were held back
                model.start_grad_sync()
            config.finalize_model_grads_func([model], None)
        return reported

    def _replay(self, forward_step_func: Callable, batch: dict[str, torch.Tensor], model: Any) -> None:
        if self._graph is None:
            self._batch = {name: value.clone() for name, value in batch.items()}
            self._graph = self._record(forward_step_func, model)
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self._graph.replay()

    def _record(self, forward_step_func: Callable, model: DistributedDataParallel) -> torch.cuda.CUDAGraph:
        config = get_model_config(model)
        weight, config.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor, self._mtp_weight
        graph = torch.cuda.CUDAGraph()
        for state in tensor_parallel.get_cuda_rng_tracker().get_states().values():
            graph.register_generator_state(state)
        gc.collect()
        torch.cuda.empty_cache()  # the graph's activations have memory of their own
        # Other threads may go on: the reader of data pins memory, NCCL asks for events.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"), model.no_sync():
            output, _ = forward_step(
                forward_step_func,
                iter([self._batch]),
                model,
                self._micro_batches,
                None,
                self._reported,
                config,
                cp_group_size=1,
                is_last_stage=True,
            )
            _backward_step(None, output, None, config)
        config.mtp_loss_scaling_factor = weight
        return graph
