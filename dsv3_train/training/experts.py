"""How tokens spread over routed experts, layer by layer."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from dsv3_train.model.stage import Stage
from dsv3_train.recipe.schema import Model
from dsv3_train.runtime import megatron_versions


class ExpertLoad:
    """Token counts and routing biases of all MoE layers, gathered over stages; MTP's layers are the last."""

    def __init__(self, models: list[Stage], model: Model) -> None:
        moe_layers = model.num_hidden_layers - model.first_k_dense_replace
        self.shape = (moe_layers + model.num_nextn_predict_layers, model.n_routed_experts)
        self._routers: dict[int, TopKRouter] = {}
        self._first_copy = not any(stage.place.replica for stage in models)
        for stage in models:
            for layer in stage.decoder.layers:
                if hasattr(layer.mlp, "router"):
                    self._routers[layer.layer_number - 1 - model.first_k_dense_replace] = layer.mlp.router
            for depth, layer in enumerate(stage.mtp.layers if stage.mtp_process else ()):
                self._routers[moe_layers + depth] = megatron_versions.layer_of_mtp(layer).mlp.router
        self._counts: dict[int, torch.Tensor] = {}

    def capture(self) -> None:
        """Keep this rank's counts of the global batch that just went through."""
        self._counts = {index: router.local_tokens_per_expert.clone() for index, router in self._routers.items()}

    def add_up(self, group: torch.distributed.ProcessGroup) -> None:
        """Sum the routers' own counts over the ranks that hold copies of the same stages. Collective."""
        if not self._routers:
            return
        counts = [router.local_tokens_per_expert for _, router in sorted(self._routers.items())]
        summed = torch.stack(counts)
        torch.distributed.all_reduce(summed, group=group)
        for count, total in zip(counts, summed, strict=True):
            count.copy_(total)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens per expert and routing biases, both FP32 [layers, experts] on the CPU. Collective."""
        counts, biases = torch.zeros(2, *self.shape, device=torch.cuda.current_device()).unbind(0)
        for index, router in self._routers.items():
            counts[index] = self._counts[index]
            if self._first_copy:
                biases[index] = router.expert_bias
        torch.distributed.all_reduce(
            counts, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        )
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(counts, group=pipeline)
        torch.distributed.all_reduce(biases, group=pipeline)
        return counts.cpu(), biases.cpu()
