"""The model against an independent implementation: transformers' DeepseekV3, same weights, same tokens."""

from __future__ import annotations

import pytest
import torch

from parity import assembled, batch, tiny

transformers = pytest.importorskip("transformers")


def _hf_model(recipe):
    m = recipe.model
    config = transformers.DeepseekV3Config(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        moe_intermediate_size=m.moe_intermediate_size,
        num_hidden_layers=m.num_hidden_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_attention_heads,
        n_shared_experts=m.n_shared_experts,
        n_routed_experts=m.n_routed_experts,
        routed_scaling_factor=m.routed_scaling_factor,
        kv_lora_rank=m.kv_lora_rank,
        q_lora_rank=m.q_lora_rank,
        qk_rope_head_dim=m.qk_rope_head_dim,
        v_head_dim=m.v_head_dim,
        qk_nope_head_dim=m.qk_nope_head_dim,
        n_group=m.n_group,
        topk_group=m.topk_group,
        num_experts_per_tok=m.num_experts_per_tok,
        first_k_dense_replace=m.first_k_dense_replace,
        norm_topk_prob=True,
        rms_norm_eps=m.rms_norm_eps,
        **_positions(recipe),
        tie_word_embeddings=False,
        attn_implementation="eager",
        _experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05)
            if "norm" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)  # large enough to change which experts are chosen
    return model


def _positions(recipe) -> dict:
    scaling, theta = recipe.model.rope_scaling, recipe.model.rope_theta
    if scaling is None:
        return {"max_position_embeddings": recipe.training.sequence_length, "rope_theta": theta}
    return {
        "max_position_embeddings": int(scaling.factor * scaling.original_max_position_embeddings),
        "rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **scaling.model_dump()},
    }


def _names(layer: int, dense: bool) -> dict[str, str]:
    """Our name -> transformers' name, of one layer."""
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
        "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
        "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
        "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    }
    if dense:
        names["mlp.linear_fc2.weight"] = "mlp.down_proj.weight"
    else:
        names["mlp.router.weight"] = "mlp.gate.weight"
        names["mlp.router.expert_bias"] = "mlp.gate.e_score_correction_bias"
        names["mlp.experts.linear_fc1"] = "mlp.experts.gate_up_proj"
        names["mlp.experts.linear_fc2"] = "mlp.experts.down_proj"
        names["mlp.shared_experts.linear_fc2.weight"] = "mlp.shared_experts.down_proj.weight"
    return {ours + a: theirs + b for a, b in names.items()}


def _counterparts(recipe, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' weights (or gradients) under our names."""
    found = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
    }
    for layer in range(recipe.model.num_hidden_layers):
        dense = layer < recipe.model.first_k_dense_replace
        found |= {a: tensors[b] for a, b in _names(layer, dense).items() if b in tensors}
        mlp = "mlp." if dense else "mlp.shared_experts."
        gate, up = (tensors[f"model.layers.{layer}.{mlp}{name}_proj.weight"] for name in ("gate", "up"))
        found[f"decoder.layers.{layer}.{mlp}linear_fc1.weight"] = torch.cat([gate, up])
    return found


YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 0.7}


@pytest.fixture(scope="module", params=[None, YARN], ids=["", "yarn"])
def compared(request):
    """Logits and gradients of both implementations."""
    recipe = tiny(
        model={"num_nextn_predict_layers": 0, "rope_scaling": request.param, "qk_rope_head_dim": 32},
        schedule={"balance_loss": 0.0, "mtp_weight": 0.0},
    )
    reference = _hf_model(recipe)
    with assembled(recipe) as trainer:
        (model,) = trainer.models
        state = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
        weights = _counterparts(recipe, state)
        biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
        own = {**dict(model.named_parameters()), **biases}
        assert own.keys() == weights.keys()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        data = batch(recipe, 0, 0)
        ours = model(data["tokens"], data["position_ids"], None)
        theirs = reference(data["tokens"]).logits
        for logits in (ours, theirs):
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten()).backward()
        gradients = {name: p.main_grad if p.grad is None else p.grad for name, p in model.named_parameters()}
        expected = _counterparts(recipe, {name: p.grad for name, p in reference.named_parameters()})
        yield ours, theirs, gradients, expected


def test_logits(compared):
    ours, theirs, _, _ = compared
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # FP32, other order of sums


def test_every_gradient(compared):
    _, _, gradients, expected = compared
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, (name, error)
