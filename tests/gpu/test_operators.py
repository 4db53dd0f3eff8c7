"""Our Triton operators against plain PyTorch in FP32 or FP64, forward and backward."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def drawn(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "words", "bound"),
    [(torch.bfloat16, 32000, 3e-3), (torch.bfloat16, 515, 3e-3), (torch.float32, 515, 2e-6)],
)
def test_cross_entropy_of_any_width_and_type(dtype, words, bound):
    """Losses to FP32's accuracy; gradients to that of the logits' type, also where the model is nearly certain."""
    from dsv3_train.kernels.cross_entropy import cross_entropy, reference

    logits_sbv = drawn(64, 3, words, seed=1, scale=4, dtype=dtype)
    labels_bs = torch.randint(0, words, (3, 64), device="cuda")
    certain = torch.arange(32, device="cuda"), 0, labels_bs[0, :32]
    # A probability of 0.9997, which rounded to BF16, minus 1, is 0.
    logits_sbv[certain] = (logits_sbv[:32, 0].float().logsumexp(-1) + 8).to(dtype)
    weight_bs = drawn(3, 64, seed=2, dtype=torch.float32)
    exact = logits_sbv.double().requires_grad_()
    expected_bs = torch.nn.functional.cross_entropy(exact.permute(1, 2, 0), labels_bs, reduction="none")
    (expected_bs * weight_bs).sum().backward()
    assert error(reference(logits_sbv, labels_bs), expected_bs) < 1e-6
    leaf = logits_sbv.clone().requires_grad_()
    got_bs = cross_entropy(leaf * 1, labels_bs)
    (got_bs * weight_bs).sum().backward()
    assert error(got_bs, expected_bs) < 1e-6
    assert error(leaf.grad, exact.grad) < bound
    assert error(leaf.grad[certain], exact.grad[certain]) < max(bound, 1e-3)  # 1 - p in FP32


@pytest.mark.parametrize("rows", [4096, 37])
@pytest.mark.parametrize("width", [640, 2048, 200])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_with_and_without_gates(rows, width, weighted):
    from dsv3_train.kernels.swiglu import reference, swiglu

    x_tf, gradient_tf = drawn(rows, 2 * width, seed=1), drawn(rows, width, seed=2)
    probs_t1 = drawn(rows, 1, seed=3, dtype=torch.float32).sigmoid() if weighted else None
    leaves = [x_tf.clone().requires_grad_(), probs_t1.clone().requires_grad_() if weighted else None]
    got = swiglu(*leaves)
    got.backward(gradient_tf)
    exact = [x_tf.double().requires_grad_(), probs_t1.double().requires_grad_() if weighted else None]
    gate, up = exact[0].chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up * (exact[1] if weighted else 1)
    expected.backward(gradient_tf.double())
    assert error(reference(x_tf, probs_t1), expected) < 3e-3
    assert error(got, expected) < 3e-3
    assert error(leaves[0].grad, exact[0].grad) < 3e-3
    if weighted:
        assert error(leaves[1].grad, exact[1].grad) < 1e-6


def test_router_product_has_fp32_accuracy():
    from dsv3_train.kernels.router import reference, router_product

    x, weight = drawn(512, 2, 7168, seed=1), drawn(256, 7168, seed=2, scale=0.006)
    gradient = drawn(512, 2, 256, seed=3, scale=1e-3, dtype=torch.float32)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    got = router_product(*leaves)
    got.backward(gradient)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = exact[0] @ exact[1].t()
    expected.backward(gradient.double())
    assert error(got, expected) < 2e-5
    assert error(reference(x, weight), expected) < 2e-5
    # Both gradients are BF16: half a unit of its last place, 2^-9, is all that is lost.
    assert error(leaves[0].grad, exact[0].grad) < 2.2e-3
    assert error(leaves[1].grad, exact[1].grad) < 2.2e-3


COUNTS = {
    "even": [256] * 8,
    "one expert": [0, 0, 0, 2048, 0, 0, 0, 0],
    "ragged": [1, 0, 700, 129, 127, 128, 3, 960],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("out", "inner"), [(1280, 1024), (1024, 640), (192, 320)])
def test_grouped_products_of_any_division(counts, out, inner):
    """Also experts without tokens, and rows and columns that fill no tile; gradients are added to what is there."""
    from dsv3_train.kernels import grouped

    counts_e, rows = torch.tensor(counts, device="cuda"), sum(counts)
    x_ti, gradient_to = drawn(rows, inner, seed=1), drawn(rows, out, seed=2)
    weights = [drawn(out, inner, seed=10 + e, scale=0.02) for e in range(len(counts))]
    plan, table = grouped.Plan.of(counts_e, rows), grouped.addresses(weights)
    exact = [weight.double() for weight in weights]
    expected = grouped.reference(x_ti.double(), counts_e, exact)
    assert error(grouped.product(x_ti, plan, table, out, transposed=False), expected) < 3e-3
    expected = grouped.reference(gradient_to.double(), counts_e, [weight.t() for weight in exact])
    assert error(grouped.product(gradient_to, plan, table, inner, transposed=True), expected) < 3e-3
    sums = [drawn(out, inner, seed=50 + e, dtype=torch.float32) for e in range(len(counts))]
    before = [total.clone() for total in sums]
    grouped.add_weight_gradients(gradient_to, x_ti, plan, grouped.addresses(sums))
    start = 0
    for count, total, was in zip(counts, sums, before, strict=True):
        own = gradient_to[start : start + count].double().t() @ x_ti[start : start + count].double()
        assert error(total, was.double() + own) < 5e-6  # sums of 2048 products in FP32
        start += count


ROUTINGS = {
    "paper's": (256, 8, 8, 4),
    "16 in 4 groups": (16, 4, 4, 2),
    "no groups": (64, 6, 1, 1),
    "384 experts": (384, 8, 1, 1),
    "one of 8": (8, 1, 1, 1),
}


@pytest.mark.parametrize(("experts", "k", "groups", "kept"), ROUTINGS.values(), ids=ROUTINGS)
def test_routing_chooses_and_weighs_as_plain_pytorch(experts, k, groups, kept):
    from dsv3_train.kernels import routing

    logits_te = drawn(1000, experts, seed=1, dtype=torch.float32)
    bias_e = drawn(experts, seed=2, scale=0.05, dtype=torch.float32)
    gradient_te = drawn(1000, experts, seed=3, dtype=torch.float32)
    for ours, plain, arguments in (
        (routing.gates, routing.reference_gates, (bias_e, k, groups, kept, 2.5)),
        (routing.gates, routing.reference_gates, (None, k, groups, kept, 1.0)),
        (routing.balance_scores, routing.reference_balance_scores, (k,)),
    ):
        leaf, exact = logits_te.clone().requires_grad_(), logits_te.double().requires_grad_()
        got, chosen = ours(leaf, *arguments)
        expected, expected_chosen = plain(exact, *arguments)
        assert torch.equal(chosen, expected_chosen)
        assert error(got, expected) < 1e-6
        got.backward(gradient_te)
        expected.backward(gradient_te.double())
        assert error(leaf.grad, exact.grad) < 2e-6


def test_routing_chooses_k_whatever_the_logits_are():
    """The number of rows is fixed; NaN goes on as NaN, for training/guard.py."""
    from dsv3_train.kernels import routing

    logits_te = drawn(64, 200, seed=1, dtype=torch.float32)
    logits_te[0] = float("nan")
    logits_te[1, 3:] = float("nan")
    logits_te[2] = float("inf")
    logits_te[3] = float("-inf")
    logits_te[4] = 0.0
    for groups, kept in ((1, 1), (8, 4)):
        got, chosen = routing.gates(logits_te, None, 8, groups, kept, 2.5)
        assert (chosen.sum(1) == 8).all()
        assert got[0][chosen[0]].isnan().any()
    assert (routing.balance_scores(logits_te, 8)[1].sum(1) == 8).all()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[4096 * 5, 128, 16], [1000, 3, 17]], ids=["aligned", "odd"])
def test_adam_updates_as_plain_pytorch(moments, sizes):
    """Ten steps; weights in BF16 with masters in FP32, and in FP32 alone."""
    from dsv3_train.optim.adamw import AdamW
    from dsv3_train.optim.gpu_adamw import GpuAdamW

    for master in (True, False):
        made = []
        for kind in (AdamW, GpuAdamW):
            params = [drawn(n, seed=n, dtype=torch.bfloat16 if master else torch.float32) for n in sizes]
            params = [torch.nn.Parameter(param) for param in params]
            optimizer = kind(
                params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, master_weights=master, use_decoupled_grad=master,
                exp_avg_dtype=moments, exp_avg_sq_dtype=moments,
            )  # fmt: skip
            for step in range(10):
                for param in params:
                    gradient = drawn(param.numel(), seed=step, dtype=torch.float32)
                    if master:
                        param.decoupled_grad = gradient
                    else:
                        param.grad = gradient
                optimizer.step()
            made.append((params, optimizer))
        (plain, of_plain), (ours, of_ours) = made
        for one, other in zip(plain, ours, strict=True):
            bound = 3e-3 if moments == torch.bfloat16 else 1e-6
            name = "master_param" if master else None
            a = of_plain.state[one][name] if name else one
            b = of_ours.state[other][name] if name else other
            assert error(b, a) < bound
            if master:
                assert torch.equal(other.detach(), b.bfloat16())
            for state in ("exp_avg", "exp_avg_sq"):
                assert of_ours.state[other][state].dtype == moments
                assert error(of_ours.state[other][state], of_plain.state[one][state]) < bound
