"""Each rule across keys: the fault, its place, and that the advised value is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3_train.errors import UserError
from dsv3_train.recipe.load import load

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")
WORLD = "parallel.world_size=8"
DUALPIPE = ["parallel={world_size: 2, pipeline: 2}", "pipeline.schedule=dualpipe"]

# What is set, the key at fault, what the message says, and what it advises instead.
CASES = {
    "world": (["parallel={world_size: 6, pipeline: 4}"], "parallel.world_size", "4 or 8", ["parallel.world_size=8"]),
    "expert ranks": ([WORLD, "parallel.expert=16"], "parallel.expert", "1, 2, 4 or 8", ["parallel.expert=4"]),
    "experts": (
        ["parallel={world_size: 3, expert: 3}", "schedule.batch_size=9"],
        "parallel.expert",
        "16 experts do not divide over 3 ranks; set parallel.expert to 1, 2, 4, 8 or 16",
        ["parallel.expert=1"],
    ),
    "expert tensor": (
        [WORLD, "parallel.tensor=4", "parallel.expert_tensor=2"],
        "parallel.expert_tensor",
        "set it to 1 or 4",
        ["parallel.expert_tensor=4"],
    ),
    "groups": (["model.n_group=3"], "model.n_group", "16 experts do not divide into 3 groups", ["model.n_group=8"]),
    "groups per token": (["model.topk_group=5"], "model.topk_group", "set it to 4 or less", ["model.topk_group=2"]),
    "experts per token": (
        ["model={n_group: 8, topk_group: 2, num_experts_per_tok: 5}"],
        "model.num_experts_per_tok",
        "hold only 4; set it to 4 or less",
        ["model.num_experts_per_tok=4"],
    ),
    "softmax in groups": (
        ["model.scoring_func=softmax"],
        "model.n_group",
        "4 groups with scoring_func softmax",
        ["model.scoring_func=sigmoid"],
    ),
    "dense layers": (
        ["model.first_k_dense_replace=5"],
        "model.first_k_dense_replace",
        "5 dense layers of 4, and the last one has experts with Multi-Token Prediction; set it to 3 or less",
        ["model.first_k_dense_replace=3"],
    ),
    "rope": (["model.qk_rope_head_dim=7"], "model.qk_rope_head_dim", "6 or 8", ["model.qk_rope_head_dim=8"]),
    "mtp weight": (
        ["model.num_nextn_predict_layers=0"],
        "schedule.mtp_weight",
        "set schedule.mtp_weight=0",
        ["schedule.mtp_weight=0"],
    ),
    "heads": (
        [WORLD, "parallel.tensor=8"],
        "model.num_attention_heads",
        "set parallel.tensor to 1, 2 or 4, or the width to 8",
        ["model.num_attention_heads=8"],
    ),
    "vocabulary": (
        [WORLD, "parallel.tensor=2", "model.vocab_size=129"],
        "model.vocab_size",
        "128 or 130",
        ["model.vocab_size=130"],
    ),
    "dense width": (
        [WORLD, "parallel.tensor=2", "model.intermediate_size=129"],
        "model.intermediate_size",
        "128 or 130",
        ["model.intermediate_size=130"],
    ),
    "expert width": (
        [
            WORLD,
            "parallel.tensor=2",
            "parallel.expert_tensor=2",
            "model.n_shared_experts=2",
            "model.moe_intermediate_size=33",
        ],
        "model.moe_intermediate_size",
        "32 or 34",
        ["model.moe_intermediate_size=34"],
    ),
    "shared width": (
        [WORLD, "parallel.tensor=2", "model.moe_intermediate_size=33"],
        "model.n_shared_experts",
        "set parallel.tensor to 1, 3, 11 or 33",
        ["parallel.tensor=1"],
    ),
    "sequence over tensor": (
        [WORLD, "parallel.tensor=4", "training.sequence_length=34"],
        "training.sequence_length",
        "32 or 36",
        ["training.sequence_length=36"],
    ),
    "sequence over context": (
        [WORLD, "runtime.device=cuda", "parallel.context=4", "training.sequence_length=36"],
        "training.sequence_length",
        "32 or 40",
        ["training.sequence_length=40"],
    ),
    "virtual stages": (
        ["parallel={world_size: 2, pipeline: 2}", "pipeline.virtual_stages=2"],
        "pipeline.virtual_stages",
        "set pipeline.schedule=interleaved",
        ["pipeline.schedule=interleaved"],
    ),
    "interleaved without virtual stages": (
        ["parallel={world_size: 2, pipeline: 2}", "pipeline.schedule=interleaved"],
        "pipeline.schedule",
        "set pipeline.virtual_stages=2",
        ["pipeline.virtual_stages=2"],
    ),
    "interleaved on one rank": (
        ["pipeline={schedule: interleaved, virtual_stages: 2}"],
        "parallel.pipeline",
        "set parallel.pipeline=2",
        ["parallel={world_size: 2, pipeline: 2}"],
    ),
    "interleaved micro-batches": (
        [
            "parallel={world_size: 4, pipeline: 4}",
            "pipeline={schedule: interleaved, virtual_stages: 2}",
            "model.num_hidden_layers=8",
            "schedule.batch_size=6",
        ],
        "schedule.batch_size",
        "set it to 4 or 8",
        ["schedule.batch_size=8"],
    ),
    "dualpipe": (
        ["parallel={world_size: 3, pipeline: 3}", "pipeline={schedule: dualpipe, layout: Ett|t|tmL}"],
        "parallel.pipeline",
        "set parallel.pipeline to 2 or 4",
        ["parallel={world_size: 2, pipeline: 2}", "pipeline.layout=null"],
    ),
    "dualpipev on one rank": (
        ["pipeline.schedule=dualpipev"],
        "parallel.pipeline",
        "set parallel.pipeline=2",
        ["parallel={world_size: 2, pipeline: 2}"],
    ),
    "stages of a V": (
        ["parallel={world_size: 2, pipeline: 2}", "pipeline={schedule: dualpipev, layout: Ett|ttmL}"],
        "pipeline.layout",
        "2 stages, but parallel.pipeline 2 with schedule dualpipev has 4; 'Et|(t|)*2tmL' would work",
        ["pipeline.layout=Et|t|t|tmL"],
    ),
    "mtp within a V": (
        ["parallel={world_size: 2, pipeline: 2}", "pipeline={schedule: zbv, layout: Et|t|ttm|L}"],
        "pipeline.layout",
        "MTP (m) must be on the last stage",
        ["pipeline.layout=Et|t|tt|mL"],
    ),
    "pairs without experts apart": (
        [*DUALPIPE, "pipeline.overlap_pairs=true", "precision.params=bf16"],
        "pipeline.overlap_pairs",
        "parallel.expert=2 or more",
        ["parallel={world_size: 4, expert: 2, pipeline: 2}"],
    ),
    "pairs in fp32": (
        [
            "parallel={world_size: 4, expert: 2, pipeline: 2}",
            "pipeline={schedule: dualpipe, overlap_pairs: true}",
            "precision.params=fp32",
        ],
        "pipeline.overlap_pairs",
        "precision.params=bf16",
        ["precision.params=bf16"],
    ),
    "overlapped reduction in dualpipe": (
        [*DUALPIPE, "parallel.overlap_grad_reduce=true"],
        "parallel.overlap_grad_reduce",
        "their collectives would cross",
        ["parallel.overlap_grad_reduce=false"],
    ),
    "overlapped reduction of deferred gradients": (
        ["parallel={world_size: 2, pipeline: 2}", "pipeline.schedule=zb1p", "parallel.overlap_grad_reduce=true"],
        "parallel.overlap_grad_reduce",
        "pipeline.defer_weight_gradients=false",
        ["pipeline.defer_weight_gradients=false"],
    ),
    "uneven": (
        ["parallel={world_size: 3, pipeline: 3}"],
        "pipeline.layout",
        "4 layers do not spread evenly over 3 stages; write a layout such as 'Ett|t|tmL'",
        ["pipeline.layout=Ett|t|tmL"],
    ),
    "stages": (
        ["pipeline.layout=Ett|ttmL"],
        "pipeline.layout",
        "2 stages, but parallel.pipeline 1",
        ["pipeline.layout=null"],
    ),
    "layers": (["pipeline.layout=EtttmL"], "pipeline.layout", "3 decoder layers (t)", ["pipeline.layout=EttttmL"]),
    "mtp modules": (["pipeline.layout=EttttL"], "pipeline.layout", "0 MTP modules (m)", ["pipeline.layout=EttttmL"]),
    "embedding": (["pipeline.layout=tEtttmL"], "pipeline.layout", "the embedding (E)", ["pipeline.layout=EttttmL"]),
    "head": (["pipeline.layout=EttttLm"], "pipeline.layout", "the head (L)", ["pipeline.layout=EttttmL"]),
    "mtp before layers": (
        ["pipeline.layout=EtttmtL"],
        "pipeline.layout",
        "MTP (m) must come after",
        ["pipeline.layout=EttttmL"],
    ),
    "mtp on two stages": (
        ["parallel={world_size: 2, pipeline: 2}", "model.num_nextn_predict_layers=2", "pipeline.layout=Ettttm|mL"],
        "pipeline.layout",
        "all MTP modules (m) must be on one stage",
        ["pipeline.layout=Etttt|mmL"],
    ),
    "one expert per token": (
        ["model.num_experts_per_tok=1"],
        "model.num_experts_per_tok",
        "a single expert's gate would be its score",
        ["model.num_experts_per_tok=2"],
    ),
    "pairs that recompute moe layers": (
        [
            "parallel={world_size: 4, pipeline: 2, expert: 2}",
            "pipeline={schedule: dualpipe, overlap_pairs: true}",
            "precision.params=bf16",
            "training.recompute=[moe]",
        ],
        "pipeline.overlap_pairs",
        "take moe out of training.recompute",
        ["training.recompute=[]"],
    ),
    "pairs with one expert a rank": (
        [
            "parallel={world_size: 8, pipeline: 2, expert: 4}",
            "pipeline={schedule: dualpipe, overlap_pairs: true}",
            "precision.params=bf16",
            "model={n_routed_experts: 4, n_group: 2, topk_group: 2}",
        ],
        "pipeline.overlap_pairs",
        "needs two experts a rank",
        ["parallel.expert=2"],
    ),
    "mtp before the head's stage": (  # its embedding would get the gradients of the head
        ["parallel={world_size: 3, pipeline: 3}", "schedule.batch_size=9", "pipeline.layout=Ett|ttm|L"],
        "pipeline.layout",
        "MTP (m) must be on the last stage, with the head",
        ["pipeline.layout=Ett|tt|mL"],
    ),
    "mtp in an early virtual stage": (
        [
            "parallel={world_size: 2, pipeline: 2}",
            "pipeline={schedule: interleaved, virtual_stages: 2}",
            "pipeline.layout=Ett|ttm||L",
        ],
        "pipeline.layout",
        "MTP (m) must be on the last stage",
        ["pipeline.layout=Ett|tt||mL"],
    ),
    "batch too small": (
        ["parallel.world_size=16"],
        "schedule.batch_size",
        "8 sequences are fewer than micro_batch_size 1 x data parallel 16 = 16; begin at 16",
        ["schedule.batch_size=16"],
    ),
    "ramp begins too small": (
        [WORLD, "schedule.batch_size=[{linear: [4, 16], until: 10 steps}, {constant: 16}]"],
        "schedule.batch_size.0",
        "begin at 8",
        ["schedule.batch_size.0.linear=[8, 16]"],
    ),
    "batch divides": (
        ["parallel.world_size=4", "schedule.batch_size=[{linear: [4, 10], until: 10 steps}, {constant: 10}]"],
        "schedule.batch_size.1",
        "set it to 8 or 12",
        ["schedule.batch_size.1.constant=12"],
    ),
    "piece without end": (
        ["schedule.lr=[{constant: 1}, {constant: 2}]"],
        "schedule.lr.0",
        "say where this one ends",
        ["schedule.lr.0.until=10 steps"],
    ),
    "ends go back": (
        ["schedule.lr=[{constant: 1, until: 20 steps}, {constant: 2, until: 20 steps}, {constant: 3}]"],
        "schedule.lr.1.until",
        "20 steps is not after 20 steps",
        ["schedule.lr.1.until=30 steps"],
    ),
    "no length": (
        ["schedule.lr=[{constant: 1, until: 0}, {constant: 2}]"],
        "schedule.lr.0.until",
        "a piece of no length",
        ["schedule.lr.0.until=1"],
    ),
    "ends before the run": (
        ["schedule.lr=[{constant: 1, until: 99 steps}]"],
        "schedule.lr.0.until",
        "99 steps is before the run's end, training.duration=100 steps",
        ["training.duration=99 steps"],
    ),
    "negative": (["schedule.lr=-1e-3"], "schedule.lr", "must not be negative", ["schedule.lr=0"]),
    "no run": (["training.duration=0 steps"], "training.duration", "must be longer", ["training.duration=1 steps"]),
    "param gather": (
        ["parallel.overlap_param_gather=true"],
        "parallel.overlap_param_gather",
        "needs parallel.overlap_grad_reduce=true too",
        ["parallel.overlap_grad_reduce=true"],
    ),
    "moments": (
        ["parallel.zero1=false"],
        "precision.adam_moments",
        "parallel.zero1=true",
        ["precision.adam_moments=fp32"],
    ),
    "steps computed twice": (
        ["faults.rerun_interval=5", "runtime.device=auto"],
        "faults.rerun_interval",
        "needs runtime.deterministic=true on GPUs",
        ["runtime.device=cpu"],
    ),
    "a moment that BF16 cannot follow": (
        ["optim.beta2=0.999"],
        "optim.beta2",
        "set precision.adam_moments=fp32",
        ["precision.adam_moments=fp32"],
    ),
    "an average of FP8": (
        ["precision={fp8: blockwise, params: bf16, fp8_params: true}", "optim.ema_decay=0.9", "runtime.device=cuda"],
        "optim.ema_decay",
        "rounded to FP8",
        ["optim.ema_decay=null"],
    ),
    "tokenizer": (
        ["data.prepare={inputs: [a], output: b, vocab_size: 129}"],
        "data.prepare.vocab_size",
        "set it to 128 or less",
        ["data.prepare.vocab_size=128"],
    ),
    "validation": (
        ["training.eval_interval=5", "data.valid_fraction=0"],
        "training.eval_interval",
        "data.valid_fraction=0.01",
        ["data.valid_fraction=0.01"],
    ),
    "recompute": (["training.recompute=[full, moe]"], "training.recompute", "[full]", ["training.recompute=[full]"]),
    "fp8 on a CPU": (
        ["precision={fp8: blockwise, params: bf16}"],
        "precision.fp8",
        "blockwise needs a GPU",
        ["runtime.device=cuda"],
    ),
    "emulated fp8 on a GPU": (
        ["precision={fp8: emulated, params: fp32}", "runtime.device=cuda"],
        "precision.fp8",
        "set runtime.device=cpu",
        ["runtime.device=cpu"],
    ),
    "emulated fp8 over bf16": (
        ["precision={fp8: emulated, params: bf16}"],
        "precision.params",
        "set precision.params=fp32",
        ["precision.params=fp32"],
    ),
    "fp8 over fp32": (
        ["precision={fp8: current, params: fp32}", "runtime.device=cuda"],
        "precision.params",
        "set precision.params=bf16",
        ["precision.params=bf16"],
    ),
    "fp8 weights without fp8": (
        ["precision.fp8_params=true"],
        "precision.fp8_params",
        "parallel.zero1=true",
        ["precision.fp8_params=false"],
    ),
    "fp8 dispatch": (
        ["precision.fp8_dispatch=true", "parallel.dispatcher=allgather"],
        "precision.fp8_dispatch",
        "set that",
        ["parallel.dispatcher=alltoall"],
    ),
    "swiglu input": (
        ["precision.swiglu_input=fp8"],
        "precision.swiglu_input",
        "needs moe_act",
        ["training.recompute=[moe_act]"],
    ),
    "attention output": (
        ["precision.attention_output=e5m6", "training.recompute=[core_attn]"],
        "precision.attention_output",
        "computes attention again",
        ["training.recompute=[]"],
    ),
    "context on a CPU": (
        ["parallel={world_size: 2, context: 2}"],
        "parallel.context",
        "set parallel.context=1",
        ["parallel.context=1"],
    ),
    "deepep on a CPU": (
        ["parallel.dispatcher=deepep"],
        "parallel.dispatcher",
        "set parallel.dispatcher=alltoall",
        ["parallel.dispatcher=alltoall"],
    ),
}


def expand(overrides: list[str]) -> list[str]:
    """`model={a: 1, b: 2}` as single keys: the other settings of the section stay."""
    single = []
    for override in overrides:
        if override.startswith("model={"):
            single += ["model." + pair.replace(": ", "=") for pair in override[7:-1].split(", ")]
        else:
            single.append(override)
    return single


@pytest.mark.parametrize("name", list(CASES))
def test_the_rule(name):
    overrides, key, message, advised = CASES[name]
    overrides = expand(overrides)
    with pytest.raises(UserError) as caught:
        load(TINY, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    place, _, rest = lines[0].partition(f": {key}: ")
    assert message in rest
    # At the setting's own place: the override if it set the key, a line of the file if that did.
    assert place.startswith(("override '", TINY))
    load(TINY, [*overrides, *advised])


def test_a_check_points_at_the_line_of_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: {TINY}\nparallel:\n  pipeline: 2\n  world_size: 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml:4: parallel\.world_size: .* set parallel\.world_size to 2 or 4"):
        load(str(tmp_path / "mine.yaml"))


def test_checks_report_together():
    with pytest.raises(UserError) as caught:
        load(TINY, ["precision.fp8=blockwise", "model.n_group=3", "training.recompute=[full, mlp]"])
    assert len(str(caught.value).splitlines()) == 3
