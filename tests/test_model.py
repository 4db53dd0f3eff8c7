"""Parts of the model on their own: experts, RoPE, the cache for generation."""

from __future__ import annotations

import pytest
import torch

from parity import assembled, batch, tiny


@pytest.fixture(scope="module")
def trainer():
    with assembled(tiny()) as parts:
        yield parts


def test_grouped_experts_equal_sequential_ones(trainer):
    """Megatron's SequentialMLP with the same weights: outputs, gradients, checkpoint names and shapes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from dsv3_train.model.config import megatron_config
    from dsv3_train.model.init import sharding_metadata

    grouped = trainer.models[0].decoder.layers[1].mlp.experts
    experts = grouped.num_local_experts
    sequential = SequentialMLP(
        experts,
        megatron_config(trainer.recipe, "cpu"),  # it is deep-copied, which the trainer's, once connected, cannot be
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    with torch.no_grad():
        for i, expert in enumerate(sequential.local_experts):
            expert.linear_fc1.weight.copy_(grouped.linear_fc1[i])
            expert.linear_fc2.weight.copy_(grouped.linear_fc2[i])
    counts = torch.arange(experts) % 5  # some experts get no token
    torch.manual_seed(0)
    hidden = torch.randn(int(counts.sum()), trainer.config.hidden_size)
    probs = torch.rand(int(counts.sum()))
    results = []
    for module in (grouped, sequential):
        x, p = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        out, bias = module(x, counts, p)
        assert bias is None
        grads = torch.autograd.grad(out.square().sum(), [x, p, *module.parameters()])
        results.append((out, *grads[:2], grads[2:]))
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(ours, theirs)
    fc1, fc2 = results[0][3]
    assert torch.equal(fc1, torch.stack(results[1][3][0::2]))
    assert torch.equal(fc2, torch.stack(results[1][3][1::2]))

    def keys(module):
        entries = module.sharded_state_dict("experts.", (), sharding_metadata())
        pieces = [p for e in nested_values(entries) for p in (e.build() if hasattr(e, "build_fn") else [e])]
        return {(p.key, tuple(p.global_shape)) for p in pieces if "_extra_state" not in p.key}

    assert keys(grouped) == keys(sequential)


def test_rope_is_plain_unless_the_recipe_scales_it(trainer):
    """Megatron's MLA would stretch RoPE by 40 and the softmax scale by 1.87 at 4K if left to its defaults."""
    attention = trainer.models[0].decoder.layers[0].self_attention
    m = trainer.recipe.model
    assert attention.softmax_scale == pytest.approx((m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5)
    angles_s11d, mscale = attention.rotary_pos_emb(trainer.recipe.training.sequence_length)
    assert mscale == 1.0
    half = m.qk_rope_head_dim // 2
    frequencies = m.rope_theta ** (-torch.arange(half) / half)
    expected = torch.arange(trainer.recipe.training.sequence_length)[:, None] * frequencies
    torch.testing.assert_close(angles_s11d[:, 0, 0, :half], expected, rtol=1e-5, atol=1e-6)


def test_scaled_rope_reaches_the_softmax(trainer):
    from dsv3_train.model.config import megatron_config

    scaling = {"factor": 40.0, "original_max_position_embeddings": 4096}
    config = megatron_config(tiny(model={"rope_scaling": scaling}), "cpu")
    assert (config.rotary_scaling_factor, config.mscale_all_dim) == (40.0, 1.0)


def test_initial_weights(trainer):
    """Normal of the recipe's width, ones, zeros; other seeds give other weights."""
    model = trainer.models[0]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(trainer.recipe.model.initializer_range, rel=0.15), (
                name
            )
    first, second = model.decoder.layers[1], model.decoder.layers[2]
    assert not torch.equal(first.mlp.experts.linear_fc1, second.mlp.experts.linear_fc1)
    assert not torch.equal(first.mlp.experts.linear_fc1[0], first.mlp.experts.linear_fc1[1])
    assert not first.mlp.router.expert_bias.any()


def test_cached_generation_equals_reading_anew(trainer):
    """Logits token by token, and after a prompt in two pieces, against one pass over the whole text."""
    from dsv3_train.generation.sample import Decoder

    model = trainer.models[0].eval()
    tokens = batch(trainer.recipe, 0, 0)["tokens"][:, :20]
    mtp, trainer.config.mtp_num_layers = trainer.config.mtp_num_layers, None  # as `generate` builds the model
    model.mtp_process = False
    try:
        with torch.no_grad():
            whole = model(tokens, torch.arange(20)[None], None)
        decoder = Decoder(model, 20)
        torch.testing.assert_close(decoder.read(tokens[:, :7]), whole[0, 6], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoder.read(tokens[:, 7:12]), whole[0, 11], rtol=1e-4, atol=1e-5)
        for i in range(12, 20):
            torch.testing.assert_close(decoder.read(tokens[:, i : i + 1]), whole[0, i], rtol=1e-4, atol=1e-5)
    finally:
        trainer.config.mtp_num_layers, model.mtp_process = mtp, True
        model.train()


def test_choice_of_tokens(trainer):
    from dsv3_train.generation.sample import choose

    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 0.0, 1.0, generator) == choose(logits, 1e-300, 1.0, generator) == 0
    drawn = [choose(logits, 1.0, 0.7, generator) for _ in range(400)]
    assert set(drawn) == {0, 1}  # 0.5 + 0.3 crosses 0.7; the rest is out
    assert 0.5 < drawn.count(0) / 400 < 0.75  # 0.625 expected
    assert {choose(logits, 1.0, 1.0, generator) for _ in range(400)} == {0, 1, 2, 3}


def test_ema_follows_the_parameters(trainer):
    from dsv3_train.optim.ema import ParameterEma

    ema = ParameterEma(trainer.models, 0.75)
    weight = trainer.models[0].output_layer.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    ema.update()
    with torch.no_grad():
        weight.add_(1.0)  # after the copy: not part of it
    (average,) = [e.data for e in ema.sharded_state_dict().values() if e.key == "ema.output_layer.weight"]
    torch.testing.assert_close(average, before + 0.25)
    with torch.no_grad():
        weight.sub_(2.0)
    assert len(ema.sharded_state_dict()) == len(list(trainer.models[0].parameters()))
