"""AdamW against torch's, and what its states are stored in."""

import pytest
import torch

from dsv3_train.optim.adamw import AdamW
from dsv3_train.optim.schedules import Values
from parity import assembled, batch, tiny

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def trained(optimizer_class, steps: int = 10, **options):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(40, 30))
    optimizer = optimizer_class([param], **OPTIONS, **options)
    for step in range(steps):
        param.grad = torch.sin(param.detach() * (step + 1))
        optimizer.step()
    return param, optimizer


def test_equals_torch():
    ours, _ = trained(AdamW)
    theirs, _ = trained(torch.optim.AdamW)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_bf16_moments_stay_close_and_stay_bf16():
    moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    ours, optimizer = trained(AdamW, **moments)
    theirs, _ = trained(torch.optim.AdamW)
    assert (ours - theirs).abs().max() < 0.02 * 10 * OPTIONS["lr"]  # 2^-8 of each of ten updates, and some
    assert not torch.equal(ours, theirs)
    param = torch.nn.Parameter(ours.detach().clone())
    again = AdamW([param], **OPTIONS, **moments)
    again.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert again.state[param][name].dtype == torch.bfloat16
        assert torch.equal(again.state[param][name], optimizer.state[ours][name])
    assert again.param_groups[0]["step"] == 10


def test_master_weights_keep_what_bf16_parameters_lose():
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, master_weights=True, use_decoupled_grad=True)
    for _ in range(100):
        param.decoupled_grad = torch.ones(8)
        optimizer.step()
    # One update of 1e-4 is under BF16's spacing at 1; a hundred are not.
    torch.testing.assert_close(optimizer.state[param]["master_param"], torch.full((8,), 0.99), rtol=1e-5, atol=0)
    assert param[0] == torch.tensor(0.99, dtype=torch.bfloat16)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_run_that_goes_back_to_weights_begins_anew(moments):
    """After a spike before the first checkpoint: no moment, step count or FP32 master of before is left."""
    recipe = tiny(precision={"params": "bf16", "adam_moments": moments}, parallel={"zero1": True})
    values = Values(lr=1e-2, batch_size=8, mtp_weight=0.3, bias_update_speed=0.0)
    with assembled(recipe) as trainer:
        from dsv3_train.checkpoint.load import begin_from_weights
        from dsv3_train.training.step import forward_backward, update

        parameters = list(trainer.models[0].parameters())
        begin = [parameter.detach().clone() for parameter in parameters]

        def step(number: int) -> list[torch.Tensor]:
            forward_backward(trainer, values, [batch(recipe, number, i) for i in range(8)], 8)
            update(trainer, values)
            return [parameter.detach().clone() for parameter in parameters]

        first, *_ = step(0), step(1), step(2)
        with torch.no_grad():
            for parameter, weights in zip(parameters, begin, strict=True):
                parameter.copy_(weights)
        begin_from_weights(trainer.optimizer, None)
        again = step(0)
    assert not torch.equal(first[0], begin[0])
    assert [index for index, (a, b) in enumerate(zip(again, first, strict=True)) if not torch.equal(a, b)] == []


def test_coupled_weight_decay_is_refused():
    with pytest.raises(ValueError, match="decoupled"):
        AdamW([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)
