"""All that differs between the versions of Megatron-core that this project runs on: 0.16.1, and 0.17 to 0.19.

Nothing else in the project asks for a version of it (tests/test_versions.py). Each function says what changed; when
0.16.1 goes, it becomes what its last lines do, and its callers can do that themselves. What changed is looked for
where it can be: a name or a signature says more than a number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any

import torch


@functools.cache
def older_than(major: int, minor: int) -> bool:
    """Whether the installed Megatron-core is older than `major.minor`. For this file and the tests of patches."""
    return tuple(int(part) for part in version("megatron-core").split(".")[:2]) < (major, minor)


def superfluous_patches() -> Collection[str]:
    """Patches of runtime/cpu.py that the installed version does not need: not applied, and not missed.

    Those that 0.17 no longer needs go with 0.16.1, and `ranges` with 0.17.
    """
    if older_than(0, 17):
        return ("share_storage",)  # it copies recomputed outputs itself
    # It says where Transformer Engine is missing; from 0.18 on it names parts for a profiler only where asked to.
    return ("have_te", "te_gemm") if older_than(0, 18) else ("have_te", "te_gemm", "ranges")


def local_experts() -> type:
    """The class that a specification of local layers names for routed experts.

    0.16 has GroupedMLP, which needs the package grouped_gemm; later there is SequentialMLP alone.
    """
    from megatron.core.transformer.moe import experts

    return getattr(experts, "GroupedMLP", experts.SequentialMLP)


def module_of(spec: Any) -> Any:
    """What a part of a layer specification builds: ModuleSpec in 0.16, later for some parts functools.partial."""
    return spec.func if isinstance(spec, functools.partial) else spec.module


def layer_of_mtp(layer: Any) -> Any:
    """The transformer layer within an MTP layer: `transformer_layer` in 0.16, later `mtp_model_layer`.

    Checkpoints have the older name with either.
    """
    return layer.transformer_layer if hasattr(layer, "transformer_layer") else layer.mtp_model_layer


def tracked_mtp_loss() -> torch.Tensor | None:
    """MTP's losses as Megatron-core adds them up over micro-batches, [depths]: `values` in 0.16, later `loss_values`.

    None where no micro-batch has been through MTP. To be zeroed by the caller.
    """
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    return tracker.get("values", tracker.get("loss_values"))


def backward_step() -> Callable[[Any, Any, Any, Any], Any]:
    """Megatron-core's backward pass of a stage: of its inputs, output, the output's gradient, and the configuration.

    0.16 wants a kind of model before the last, which it does not look at.
    """
    from megatron.core.pipeline_parallel.schedules import backward_step

    if "model_type" not in inspect.signature(backward_step).parameters:
        return backward_step
    return lambda inputs, output, gradient, config: backward_step(inputs, output, gradient, None, config)


def attention_node(layer_plan: Any) -> Any:
    """The node of a layer's schedule plan before dispatch: `attn` in 0.16, later `pre_dispatch_computation`."""
    return layer_plan.attn if hasattr(layer_plan, "attn") else layer_plan.pre_dispatch_computation


def plan_of_save(strategy: Any, sharded_state_dict: dict, directory: Any) -> Any:
    """`async_save` of Megatron-core's own writer; newer versions take NVIDIA's resiliency extension if not told."""
    options = inspect.signature(strategy.async_save).parameters
    return strategy.async_save(
        sharded_state_dict, directory, **({"async_strategy": "mcore"} if "async_strategy" in options else {})
    )


def deepep_sms(count: int) -> dict[str, int]:
    """DeepEP's streaming multiprocessors in TransformerConfig: later one number for all flexible dispatchers."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    later = "moe_flex_dispatcher_num_sms"
    return {later if hasattr(TransformerConfig, later) else "moe_deepep_num_sms": count}


def keep_query_without_norm() -> None:
    """Let queries without a latent (`q_lora_rank: null`) be projected as they are, as in DeepSeek's code.

    Since 0.19 `qk_layernorm` asks for a norm before that projection too: with Transformer Engine's layers another model
    is built without a word, with local ones none. Older versions norm latents alone.
    """
    from megatron.core.transformer import multi_latent_attention

    theirs = getattr(multi_latent_attention, "QKNormConfigResolver", None)
    if theirs is None or hasattr(theirs, "keeps_query_without_norm"):
        return

    class Resolver(theirs):  # type: ignore[misc,valid-type]
        keeps_query_without_norm = True
        has_q_lora: bool

        def resolve(self) -> dict[str, Any]:
            if self.has_q_lora:
                return super().resolve()
            self.has_q_lora = True  # what that gives for the latent's part, nobody builds
            return {**super().resolve(), "linear_q_proj": self.submodules.linear_q_proj}

    multi_latent_attention.QKNormConfigResolver = Resolver
