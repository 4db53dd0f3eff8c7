"""What depends on several keys of a recipe.

Each check yields (key, message); the message names what to set, with values that would work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import gcd, lcm

from dsv3_train.recipe.pipeline_checks import pipeline
from dsv3_train.recipe.placement import placement
from dsv3_train.recipe.quantity import Steps
from dsv3_train.recipe.ranges import SCHEDULED
from dsv3_train.recipe.schema import Recipe, Segment

Faults = Iterator[tuple[str, str]]
"""Dotted key and what is wrong with its value."""


def check(recipe: Recipe) -> list[tuple[str, str]]:
    """All faults of a recipe whose single values are valid."""
    found = [fault for look in _CHECKS for fault in look(recipe)]
    if not any(key == "parallel.world_size" for key, _ in found):  # else there is no data-parallel size to count in
        found += _batch_size(recipe)
    return found


def _world(recipe: Recipe) -> Faults:
    p = recipe.parallel
    group = p.tensor * p.pipeline * p.context
    if p.world_size % group:
        yield (
            "parallel.world_size",
            f"{p.world_size} processes do not divide by tensor {p.tensor} x pipeline {p.pipeline} x "
            f"context {p.context} = {group}; set parallel.world_size to {_multiples(p.world_size, group)}",
        )


def _experts(recipe: Recipe) -> Faults:
    m, p = recipe.model, recipe.parallel
    ranks = p.world_size // p.pipeline
    if p.expert_tensor not in (1, p.tensor):
        allowed = "1" if p.tensor == 1 else f"1 or {p.tensor}"
        yield "parallel.expert_tensor", f"{p.expert_tensor} with parallel.tensor {p.tensor}; set it to {allowed}"
    elif p.world_size % p.pipeline == 0 and ranks % (p.expert * p.expert_tensor):
        yield (
            "parallel.expert",
            f"expert {p.expert} x expert_tensor {p.expert_tensor} does not divide the {ranks} processes of a pipeline "
            f"stage (world_size / pipeline); set parallel.expert to "
            f"{_divisors(gcd(m.n_routed_experts, ranks // gcd(ranks, p.expert_tensor)))}, or another world_size",
        )
    if m.n_routed_experts % p.expert:
        yield (
            "parallel.expert",
            f"{m.n_routed_experts} experts do not divide over {p.expert} ranks; set parallel.expert to "
            f"{_divisors(m.n_routed_experts)}",
        )


def _routing(recipe: Recipe) -> Faults:
    m = recipe.model
    if m.n_routed_experts % m.n_group:
        yield (
            "model.n_group",
            f"{m.n_routed_experts} experts do not divide into {m.n_group} groups; "
            f"set it to {_divisors(m.n_routed_experts)}",
        )
    elif m.scoring_func == "sigmoid" and m.num_experts_per_tok == 1:
        # Megatron-core does not norm a single score (moe_utils.topk_routing_with_score_function).
        yield (
            "model.num_experts_per_tok",
            "a single expert's gate would be its score, and is 1 in the report (equation 13); set it to 2 or more",
        )
    elif m.scoring_func == "softmax" and m.n_group > 1:
        # DeepSeek-V2 scores a group by its best expert; Megatron-core by a sum.
        yield "model.n_group", f"{m.n_group} groups with scoring_func softmax; set model.n_group=1, or sigmoid"
    elif m.topk_group > m.n_group:
        yield "model.topk_group", f"{m.topk_group} of only {m.n_group} groups; set it to {m.n_group} or less"
    elif m.num_experts_per_tok > (reach := m.n_routed_experts // m.n_group * m.topk_group):
        yield (
            "model.num_experts_per_tok",
            f"{m.num_experts_per_tok} experts per token, but topk_group {m.topk_group} groups hold only {reach}; "
            f"set it to {reach} or less, or raise model.topk_group",
        )
    elif m.n_group > 1 and m.n_routed_experts // m.n_group < 2:
        yield "model.n_group", f"groups of one expert; set it to {m.n_routed_experts // 2} or less"


def _model(recipe: Recipe) -> Faults:
    m = recipe.model
    # Megatron-core makes Multi-Token Prediction's layer like the last one, and it has experts.
    most = m.num_hidden_layers - bool(m.num_nextn_predict_layers)
    if m.first_k_dense_replace > most:
        last = ", and the last one has experts with Multi-Token Prediction" if m.num_nextn_predict_layers else ""
        yield (
            "model.first_k_dense_replace",
            f"{m.first_k_dense_replace} dense layers of {m.num_hidden_layers}{last}; set it to {most} or less",
        )
    if m.qk_rope_head_dim % 2:
        yield (
            "model.qk_rope_head_dim",
            f"{m.qk_rope_head_dim} is odd and RoPE rotates pairs; set it to {_multiples(m.qk_rope_head_dim, 2)}",
        )
    rope = m.rope_scaling
    if rope is not None and rope.beta_slow > rope.beta_fast:
        yield (
            "model.rope_scaling.beta_slow",
            f"{rope.beta_slow:g} is more than beta_fast {rope.beta_fast:g}; set it to {rope.beta_fast:g} or less",
        )
    if m.num_nextn_predict_layers == 0 and any(max(_values(piece)) > 0 for piece in recipe.schedule.mtp_weight):
        yield (
            "schedule.mtp_weight",
            "a weight for Multi-Token Prediction, which the model lacks; set schedule.mtp_weight=0, or "
            "model.num_nextn_predict_layers=1",
        )


def _tensor_widths(recipe: Recipe) -> Faults:
    m, p = recipe.model, recipe.parallel
    for key, width, name, size in (
        ("model.num_attention_heads", m.num_attention_heads, "parallel.tensor", p.tensor),
        ("model.vocab_size", m.vocab_size, "parallel.tensor", p.tensor),
        ("model.intermediate_size", m.intermediate_size, "parallel.tensor", p.tensor),
        ("model.moe_intermediate_size", m.moe_intermediate_size, "parallel.expert_tensor", p.expert_tensor),
    ):
        if width % size:
            yield (
                key,
                f"{width} does not divide over {name} {size}; set {name} to {_divisors(width)}, "
                f"or the width to {_multiples(width, size)}",
            )
    shared = m.n_shared_experts * m.moe_intermediate_size
    if shared % p.tensor:
        yield (
            "model.n_shared_experts",
            f"{m.n_shared_experts} x moe_intermediate_size {m.moe_intermediate_size} does not divide over "
            f"parallel.tensor {p.tensor}; set parallel.tensor to {_divisors(shared)}",
        )


def _sequence_length(recipe: Recipe) -> Faults:
    p, length = recipe.parallel, recipe.training.sequence_length
    # Sequence parallelism shares positions among tensor ranks; context parallelism cuts them into 2 chunks a rank.
    multiple = lcm(p.tensor * p.context, 2 * p.context if p.context > 1 else 1)
    if length % multiple:
        yield (
            "training.sequence_length",
            f"{length} tokens do not divide over tensor {p.tensor} and context {p.context} (2 chunks a rank); "
            f"set it to {_multiples(length, multiple)}",
        )


def _batch_size(recipe: Recipe) -> Faults:
    p, pieces = recipe.parallel, recipe.schedule.batch_size
    multiple = recipe.batch_multiple
    made_of = f"micro_batch_size {recipe.training.micro_batch_size} x data parallel {p.data}"
    if recipe.pipeline.schedule == "interleaved":
        made_of += f" x pipeline {p.pipeline} (interleaved)"
    for index, piece in enumerate(pieces):
        key = "schedule.batch_size" if len(pieces) == 1 else f"schedule.batch_size.{index}"
        smallest = min(_values(piece))
        if smallest < multiple:
            yield (
                key,
                f"{smallest:g} sequences are fewer than {made_of} = {multiple}; begin at {multiple} or more, "
                "or use fewer processes",
            )
        elif piece.constant is not None and piece.constant % multiple:
            yield (
                key,
                f"{piece.constant:g} sequences do not divide by {made_of} = {multiple}; set it to "
                f"{_multiples(int(piece.constant), multiple)}",
            )


def _schedules(recipe: Recipe) -> Faults:
    if recipe.training.duration == 0:
        yield "training.duration", "must be longer than nothing, for example 100 steps"
    for name, (largest, why) in SCHEDULED.items():
        pieces: list[Segment] = getattr(recipe.schedule, name)
        if (most := max(value for piece in pieces for value in _values(piece))) > largest:
            yield f"schedule.{name}", f"must be at most {largest:g}, got {most:g}: {why}"
        if any(value < 0 for piece in pieces for value in _values(piece)):
            yield f"schedule.{name}", "must not be negative; write values of 0 or more"
        for index, piece in enumerate(pieces[:-1]):
            if piece.until is None:
                yield (
                    f"schedule.{name}.{index}",
                    "only the last piece goes on to the end; say where this one ends, for example until: 2000 steps",
                )
        yield from _ends(f"schedule.{name}", pieces, recipe.training.duration)


def _ends(key: str, pieces: list[Segment], duration: int) -> Faults:
    """Ends in the same unit must increase; how steps and tokens compare only the batch schedule tells."""
    for is_steps in (True, False):
        ends = [
            (index, piece.until)
            for index, piece in enumerate(pieces)
            if piece.until is not None and isinstance(piece.until, Steps) == is_steps
        ]
        if ends and ends[0][1] == 0:
            yield f"{key}.{ends[0][0]}.until", "a piece of no length; remove it, or set a later end"
        for (_, before), (index, until) in pairwise(ends):
            if until <= before:
                yield (
                    f"{key}.{index}.until",
                    f"{until} is not after {before}, where a piece before it ends; set a later end",
                )
    last = pieces[-1].until
    if last is not None and isinstance(last, Steps) == isinstance(duration, Steps) and last < duration:
        yield (
            f"{key}.{len(pieces) - 1}.until",
            f"{last} is before the run's end, training.duration={duration}; leave until out of the last piece",
        )


def _optimizer(recipe: Recipe) -> Faults:
    p, optim = recipe.parallel, recipe.optim
    lr = max(value for piece in recipe.schedule.lr for value in _values(piece))
    if lr * optim.weight_decay >= 1:
        yield (
            "optim.weight_decay",
            f"{optim.weight_decay:g} x the learning rate {lr:g} takes a weight to 0 or past it in one step; set it "
            f"below {1 / lr:.3g}, or lower schedule.lr",
        )
    if 0 < optim.clip_grad_norm < 1e-6:
        yield (
            "optim.clip_grad_norm",
            f"{optim.clip_grad_norm:g} would leave no gradient in FP32; set 1, or 0 for no clipping",
        )
    lacking = [name for name in ("zero1", "overlap_grad_reduce") if not getattr(p, name)]
    if p.overlap_param_gather and lacking:
        needed = " and ".join(f"parallel.{name}=true" for name in lacking)
        yield "parallel.overlap_param_gather", f"needs {needed} too; set that, or parallel.overlap_param_gather=false"
    if recipe.precision.adam_moments == "bf16" and not p.zero1:
        yield "precision.adam_moments", "bf16 needs parallel.zero1=true; set that, or precision.adam_moments=fp32"
    # One step changes the second moment by less than BF16's 8 bits tell apart: after 3000 steps at 0.999, and 3000 of
    # gradients a tenth as large, it is 1.24 where FP32 has 0.057; at 0.995 it is within 10% of FP32.
    if recipe.precision.adam_moments == "bf16" and recipe.optim.beta2 > 0.995:
        yield "optim.beta2", "over 0.995 a moment in BF16 stands still; lower it, or set precision.adam_moments=fp32"


def _data(recipe: Recipe) -> Faults:
    data, training = recipe.data, recipe.training
    prepare = data.prepare
    if prepare is not None and prepare.tokenizer is None and prepare.vocab_size > recipe.model.vocab_size:
        yield (
            "data.prepare.vocab_size",
            f"{prepare.vocab_size} tokens, but the model knows {recipe.model.vocab_size}; set it to "
            f"{recipe.model.vocab_size} or less, or raise model.vocab_size",
        )
    if training.eval_interval and not data.valid and data.valid_fraction == 0:
        yield (
            "training.eval_interval",
            "validation has no data; set data.valid, data.valid_fraction=0.01, or training.eval_interval=0",
        )


def _recompute(recipe: Recipe) -> Faults:
    parts = recipe.training.recompute
    if "full" in parts and len(parts) > 1:
        yield "training.recompute", "full includes all others; set training.recompute=[full], or name parts only"


def _precision(recipe: Recipe) -> Faults:
    precision, parts = recipe.precision, recipe.training.recompute
    if precision.fp8 == "emulated":
        if recipe.runtime.device != "cpu":
            yield "precision.fp8", "emulated runs on a CPU; set runtime.device=cpu, or precision.fp8=blockwise"
        if precision.params != "fp32":
            yield "precision.params", "precision.fp8=emulated rounds FP32 itself; set precision.params=fp32"
    elif precision.fp8 != "none" and precision.params != "bf16":
        yield "precision.params", f"precision.fp8={precision.fp8} needs BF16 beside it; set precision.params=bf16"
    again = {"moe_act", "layernorm"} & set(parts)
    if precision.fp8 == "delayed" and again:
        yield (
            "training.recompute",
            f"precision.fp8=delayed cannot quantise again; take out {' and '.join(sorted(again))}, or use current",
        )
    if precision.fp8_params and not (precision.fp8 == "blockwise" and recipe.parallel.zero1):
        yield "precision.fp8_params", "needs precision.fp8=blockwise and parallel.zero1=true; set both, or false"
    if precision.fp8_params and recipe.optim.ema_decay:
        yield "optim.ema_decay", "would average weights rounded to FP8; set it null, or precision.fp8_params=false"
    if precision.fp8_dispatch and recipe.parallel.dispatcher != "alltoall":
        yield "precision.fp8_dispatch", "needs parallel.dispatcher=alltoall; set that, or precision.fp8_dispatch=false"
    if precision.swiglu_input != "full" and "moe_act" not in parts:
        yield (
            "precision.swiglu_input",
            "needs moe_act in training.recompute; add it, or precision.swiglu_input=full",
        )
    if precision.attention_output != "full" and {"core_attn", "full"} & set(parts):
        yield (
            "precision.attention_output",
            "training.recompute computes attention again and keeps no output; set precision.attention_output=full",
        )
    if precision.attention_output != "full" and precision.fp8 == "delayed":
        yield "precision.attention_output", "needs another precision.fp8 than delayed; set that, or full"
    if precision.attention_output != "full" and recipe.model.num_attention_heads * recipe.model.v_head_dim % 2:
        yield "precision.attention_output", "two values share 3 bytes, and heads x v_head_dim is odd; set it to full"


def _cpu(recipe: Recipe) -> Faults:
    if recipe.runtime.device != "cpu":
        return
    if recipe.precision.fp8 not in ("none", "emulated"):
        yield (
            "precision.fp8",
            f"{recipe.precision.fp8} needs a GPU; set precision.fp8=emulated or none, or runtime.device=cuda",
        )
    if recipe.parallel.context > 1:
        yield "parallel.context", "context parallelism does not run on a CPU; set parallel.context=1"
    if recipe.parallel.dispatcher == "deepep":
        yield "parallel.dispatcher", "deepep needs GPUs; set parallel.dispatcher=alltoall, or runtime.device=cuda"


def _faults(recipe: Recipe) -> Faults:
    faults = recipe.faults
    for index, text in enumerate(faults.skip_samples):
        first, last = map(int, text.split("-"))
        if last < first:
            yield f"faults.skip_samples.{index}", f"{text} ends before it begins; write {last}-{first}"
    if faults.rerun_interval and recipe.runtime.device != "cpu" and not recipe.runtime.deterministic:
        yield (
            "faults.rerun_interval",
            "needs runtime.deterministic=true on GPUs, where the same step gives other bits otherwise; set that, or 0",
        )


_CHECKS = (
    _world,
    _experts,
    _routing,
    _model,
    _tensor_widths,
    _sequence_length,
    pipeline,
    placement,
    _schedules,
    _optimizer,
    _data,
    _recompute,
    _precision,
    _cpu,
    _faults,
)


def _values(piece: Segment) -> tuple[float, ...]:
    """The values at the ends of a piece; all others lie between them."""
    return (piece.constant,) if piece.constant is not None else (piece.linear or piece.cosine or ())


def _divisors(number: int) -> str:
    """`1, 2, 4 or 8`: what divides a number, the small ones and itself."""
    found = [n for n in range(1, min(number, 1024) + 1) if number % n == 0][:10]
    return _either([*found, *([number] if number not in found else [])])


def _multiples(number: int, of: int) -> str:
    """`8 or 16`: the multiples around a number."""
    below = number // of * of
    return _either([n for n in (below, below + of) if n > 0])


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
