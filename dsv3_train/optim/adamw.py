"""AdamW in plain PyTorch behind the interface that Megatron-core's optimizers expect of TE's FusedAdam."""

from __future__ import annotations

import torch


class AdamW(torch.optim.Optimizer):
    """AdamW with moments in FP32 or BF16 and, for ZeRO-1, FP32 master weights of its own.

    Arithmetic is FP32 whatever the moments are stored in (technical report, section 3.3.2: BF16 moments
    without observable loss of quality). The step count lives in the parameter group, as in FusedAdam, so
    that Megatron's sharded checkpoints hold nothing but tensors of a parameter's shape.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented")
        if capturable:
            raise ValueError("a step count on the GPU, for a CUDA graph of the update, is not implemented")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Zero moments and, with master weights, an FP32 copy of `param`."""
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=self.dtypes[name])
        if self.master_weights:
            state["master_param"] = param.detach().to(self.dtypes["master_param"], copy=True)

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """A state in FP32, as checkpoints keep it."""
        return self.state[param][name].float()

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Take a state out of a checkpoint, in the type that it is stored in here."""
        if name not in self.state[param]:
            self.initialize_state(param)
        self.state[param][name].copy_(value)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but every state keeps its own type: torch casts states to their parameter's."""
        super().load_state_dict({**state_dict, "state": {}})
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=True):
            saved = state_dict["state"].get(index)
            if saved:
                self.state[param] = {
                    name: value.to(param.device, self.dtypes[name], copy=True) for name, value in saved.items()
                }

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                state = self.state[param]
                grad = grad.float()
                exp_avg = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                exp_avg_sq = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
                weight = (state["master_param"] if self.master_weights else param).float()
                weight = weight * (1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(exp_avg, denominator, value=-group["lr"] / (1 - beta1**step))
                state["exp_avg"].copy_(exp_avg)
                state["exp_avg_sq"].copy_(exp_avg_sq)
                param.copy_(weight)
                if self.master_weights:
                    state["master_param"].copy_(weight)
