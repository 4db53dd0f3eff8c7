"""AdamW on a GPU: one launch for all parameters of a kind."""

from __future__ import annotations

from collections import defaultdict

import torch

from dsv3_train.kernels.adam import Tensors
from dsv3_train.optim.adamw import AdamW


class GpuAdamW(AdamW):
    """As `AdamW`, whose states and arithmetic it has, by kernels/adam.py."""

    def __init__(self, *args, store_param_remainders: bool = False, **kwargs) -> None:
        if store_param_remainders:
            raise ValueError("master weights as remainders of BF16 weights are not implemented")
        super().__init__(*args, **kwargs)
        self._kinds: dict[tuple, Tensors] = defaultdict(Tensors)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for number, group in enumerate(self.param_groups):
            if not group["params"]:
                continue
            group["step"] = step = int(group.get("step", 0)) + 1
            kinds: dict[tuple, list[list[torch.Tensor]]] = defaultdict(list)
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is None or not param.numel():
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                state = self.state[param]
                row = [param, grad, state["exp_avg"], state["exp_avg_sq"]]
                if self.master_weights:
                    row.append(state["master_param"])
                kind = (number, *(x.dtype for x in row))
                kinds[kind].append(row)
            for kind, rows in kinds.items():
                self._kinds[kind].update(
                    rows,
                    lr=group["lr"],
                    betas=tuple(group["betas"]),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step,
                )


def use(ours: bool) -> None:
    """Give Megatron-core's optimizers this class where they look for Transformer Engine's FusedAdam, or that again."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer.Adam = distrib_optimizer.Adam = GpuAdamW if ours else FusedAdam  # type: ignore[misc]
