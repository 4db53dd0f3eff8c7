"""Time of our operators on one GPU beside what they stand for: forward and backward, medians of CUDA-event times.

python tools/bench_operators.py
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch

from dsv3_train.kernels import grouped
from dsv3_train.kernels.cross_entropy import cross_entropy
from dsv3_train.kernels.router import router_product
from dsv3_train.kernels.swiglu import swiglu

BF16 = torch.bfloat16


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def drawn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def both_ways(function: Callable, *leaves: torch.Tensor) -> Callable[[], None]:
    gradient = torch.randn_like(function(*leaves))

    def work() -> None:
        out = function(*leaves)
        out.backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return work


def losses() -> None:
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    for tokens, words in ((32768, 32000), (4096, 129280)):
        labels_bs = torch.randint(0, words, (1, tokens), device="cuda")
        logits_sbv = drawn(tokens, 1, words).requires_grad_()
        labels_sb = labels_bs.t().flatten()[:, None]  # TE wants a last stride of 1

        def ours(x):
            return cross_entropy(x, labels_bs)  # noqa: B023

        def theirs(x):
            return te_parallel_cross_entropy(x.float(), labels_sb, None, True)  # noqa: B023

        a, b = (milliseconds(both_ways(way, logits_sbv), 10) for way in (ours, theirs))
        floor = 8 * tokens * words / 4.3e9
        print(
            f"cross entropy {tokens} x {words}: ours {a:.2f} ms, TE on FP32 copies {b:.2f}, floor {floor:.2f}",
            flush=True,
        )


def activations() -> None:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    for rows, width in ((131072, 640), (32768, 2048)):
        x, probs = drawn(rows, 2 * width).requires_grad_(), drawn(rows, 1, dtype=torch.float32).requires_grad_()
        a = milliseconds(both_ways(swiglu, x, probs))
        b = milliseconds(both_ways(lambda x, p: weighted_bias_swiglu_impl(x, None, p), x, probs))
        floor = 9 * 2 * rows * width / 4.3e9
        print(f"SwiGLU with gates {rows} x {width}: ours {a:.3f} ms, Megatron-core {b:.3f}, floor {floor:.3f}")
        a = milliseconds(both_ways(swiglu, x))
        b = milliseconds(both_ways(lambda x: bias_swiglu_impl(x, None), x))
        print(f"SwiGLU {rows} x {width}: ours {a:.3f} ms, Megatron-core {b:.3f}", flush=True)


def routers() -> None:
    for tokens, hidden, experts in ((32768, 1024, 16), (4096, 7168, 256)):
        x, weight = drawn(tokens, hidden).requires_grad_(), drawn(experts, hidden, scale=0.01).requires_grad_()
        from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction

        a = milliseconds(both_ways(router_product, x, weight))
        b = milliseconds(both_ways(lambda x, w: RouterGatingLinearFunction.apply(x, w, None, torch.float32), x, weight))
        print(f"router {tokens} x {hidden} x {experts}: ours {a:.3f} ms, Megatron-core {b:.3f}", flush=True)


def products() -> None:
    import transformer_engine.pytorch as te

    for experts, rows, out, inner in (
        (16, 131072, 1280, 1024),
        (16, 131072, 1024, 640),
        (8, 65536, 2048, 1024),
        (8, 65536, 1024, 1024),
        (8, 24576, 2816, 2048),
        (4, 32768, 4096, 7168),
        (4, 32768, 7168, 2048),
    ):
        x, gradient = drawn(rows, inner), drawn(rows, out)
        counts = torch.randint(rows // experts // 2, rows // experts, (experts,))
        counts[0] += rows - counts.sum()
        counts_e = counts.cuda()
        weights = [drawn(out, inner, scale=0.02) for _ in range(experts)]
        sums = [torch.zeros(out, inner, device="cuda") for _ in range(experts)]
        table, main = grouped.addresses(weights), grouped.addresses(sums)
        stack, ends = torch.stack(weights), counts_e.cumsum(0, dtype=torch.int32)
        plan = grouped.Plan.of(counts_e, rows)
        flops = 2e-9 * rows * out * inner
        linear = te.GroupedLinear(experts, inner, out, bias=False, params_dtype=BF16, fuse_wgrad_accumulation=True)
        for expert in range(experts):
            getattr(linear, f"weight{expert}").main_grad = sums[expert]
        leaf, splits = x.clone().requires_grad_(), counts.tolist()
        whole = both_ways(lambda x: linear(x, splits), leaf)  # noqa: B023
        rates = {
            "plan": milliseconds(lambda: grouped.Plan.of(counts_e, rows)),  # noqa: B023
            "ours F": milliseconds(lambda: grouped.product(x, plan, table, out, transposed=False)),  # noqa: B023
            "torch F": milliseconds(lambda: torch._grouped_mm(x, stack.transpose(1, 2), offs=ends)),  # noqa: B023
            "TE F": milliseconds(lambda: linear(x, splits)),  # noqa: B023
            "ours I": milliseconds(lambda: grouped.product(gradient, plan, table, inner, transposed=True)),  # noqa: B023
            "torch I": milliseconds(lambda: torch._grouped_mm(gradient, stack, offs=ends)),  # noqa: B023
            "ours W": milliseconds(lambda: grouped.add_weight_gradients(gradient, x, plan, main)),  # noqa: B023
            "torch W": milliseconds(lambda: torch._grouped_mm(gradient.t(), x, offs=ends)),  # noqa: B023
            "TE F+I+W": milliseconds(whole),
        }
        text = ", ".join(f"{name} {ms:.3f}" for name, ms in rates.items())
        best = {kind: round(flops / min(rates[f"ours {kind}"], rates[f"torch {kind}"])) for kind in "FIW"}
        print(f"{experts} experts {rows} x {out} x {inner}: {text} ms; best {best} TFLOPS", flush=True)


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    print(torch.cuda.get_device_name(), torch.__version__)
    for part in (products, losses, activations, routers):
        try:
            part()
        except Exception as error:  # a part must not cost the others
            print(f"{part.__name__} failed: {error!r}"[:1500], flush=True)


if __name__ == "__main__":
    main()
