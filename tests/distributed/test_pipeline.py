"""Every pipeline schedule of ours trains as one process does: losses of five steps, every gradient of the first, final
weights and an evaluation.

FP32 over gloo, where not said otherwise. Tolerance 1e-5 relative, for sums that run in another order; expert counts are
exact, and what two ranks hold copies of is the same bit by bit (`parity.whole`). The weights' seed is one of those with
which no token's choice of experts hangs on a rounding error within these steps.
"""

from __future__ import annotations

import os

import pytest

from parity import assert_same, tiny

# Uneven: of the V's eight (four) stages and the four (two) others.
LAYOUTS = {
    ("V", 4): "Ett|t|t|t|t|t|t|mL",
    ("V", 2): "Ett|t|ttt|ttmL",
    ("I", 4): "Ett|ttt|tt|tmL",
    ("I", 2): "Ettttt|tttmL",
}
SHAPES = {
    "pp4": {"pipeline": 4},
    "pp2_ep2": {"pipeline": 2, "expert": 2},
    "pp2_tp2": {"pipeline": 2, "tensor": 2},
}
# Below, at and above twice the ranks, odd numbers among them.
MICRO_BATCHES = {4: (3, 8, 11), 2: (3, 4, 7)}
STEPS = 5


def recipe(schedule: str | None, shape: str = "pp4", micro_batches: int = 4, **changes):
    """The tiny model with eight layers; without a schedule, in one process on the same global batch."""
    parallel = SHAPES[shape]
    replicas = 4 // parallel["pipeline"] // parallel.get("tensor", 1)
    raw = {
        "model": {"num_hidden_layers": 8},
        "schedule": {"batch_size": micro_batches * replicas},
        "training": {"seed": 2},
    }
    if schedule is not None:
        kind = "V" if schedule in ("zbv", "dualpipev") else "I"
        raw["parallel"] = {"world_size": 4, **parallel}
        raw["pipeline"] = {"schedule": schedule, "layout": LAYOUTS[kind, parallel["pipeline"]]}
        for section in ("parallel", "pipeline"):
            raw[section] |= changes.pop(section, {})
    else:
        changes.pop("parallel", None), changes.pop("pipeline", None)
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return tiny(**raw)


# The settings that most runs have; the other combinations with `make test-all`.
@pytest.mark.parametrize(
    ("zero1", "defer"),
    [
        pytest.param(True, True, id="zero1-deferred"),
        pytest.param(False, False, id="whole", marks=pytest.mark.slow),
        pytest.param(False, True, id="deferred", marks=pytest.mark.slow),
        pytest.param(True, False, id="zero1-whole", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        # Of the zero-bubble ones under tensor parallelism with `make test-all` too.
        pytest.param(
            schedule,
            shape,
            id=f"{schedule}-{shape}",
            marks=[pytest.mark.slow] * (shape == "pp2_tp2" and schedule in ("zbv", "zb1p")),
        )
        for schedule in ("dualpipe", "dualpipev", "zbv", "zb1p")
        for shape in SHAPES
    ],
)
def test_schedule(run, schedule, shape, zero1, defer):
    counts = MICRO_BATCHES[SHAPES[shape]["pipeline"]]
    count = counts[(zero1 + 2 * defer + list(SHAPES).index(shape)) % 3]
    changes = {"parallel": {"zero1": zero1}, "pipeline": {"defer_weight_gradients": defer, "check_messages": zero1}}
    got = run(recipe(schedule, shape, count, **changes), steps=STEPS)
    assert_same(got, run(recipe(None, shape, count), steps=STEPS))


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_a_single_micro_batch(run, schedule):
    """Fewer than anybody trains with: in dualpipe one direction then has none."""
    assert_same(run(recipe(schedule, micro_batches=1), steps=2), run(recipe(None, micro_batches=1), steps=2))


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize(
    "modules",
    [["layernorm", "mla_up_proj", "moe_act"], pytest.param(["full"], marks=pytest.mark.slow)],
    ids=["parts", "full"],
)
def test_recompute(run, schedule, modules):
    got = run(recipe(schedule, "pp2_ep2", 4, training={"seed": 2, "recompute": modules}), steps=2)
    assert_same(got, run(recipe(None, "pp2_ep2", 4), steps=2))


@pytest.mark.parametrize("schedule", ["dualpipev", "zb1p"])
def test_overlapped_reductions(run, schedule):
    """Gradients are reduced when a chunk has its last, parameters gathered when it needs its first."""
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, "zero1": True}
    whole = {"defer_weight_gradients": False}
    got = run(recipe(schedule, "pp2_ep2", 4, parallel=overlap, pipeline=whole), steps=STEPS)
    assert_same(got, run(recipe(None, "pp2_ep2", 4), steps=STEPS))


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_per_token_loss(run, schedule):
    """Megatron's `calculate_per_token_loss` divides by the tokens of the global batch, which any rank may have."""
    options = {"steps": 2, "settings": {"calculate_per_token_loss": True}}
    got = run(recipe(schedule, "pp2_ep2", 3, parallel={"zero1": True}), **options)
    assert_same(got, run(recipe(None, "pp2_ep2", 3), **options))


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_sequences_of_differing_length(run, schedule):
    """Shapes travel before the tensors."""
    options = {"steps": 2, "lengths": (32, 20, 27), "settings": {"variable_seq_lengths": True}}
    assert_same(run(recipe(schedule, micro_batches=6), **options), run(recipe(None, micro_batches=6), **options))


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_overlapped_pairs(run, schedule):
    """BF16, through Megatron-core's schedule plan: the same bits as one pass after the other.

    A CPU has one queue for all streams, so that this shows the order of the parts and what they hand on, not speed.
    """
    results = {}
    for overlap in (False, True):
        bf16 = {"params": "bf16", "adam_moments": "fp32"}
        pipeline = {"overlap_pairs": overlap}
        settings = recipe(schedule, "pp2_ep2", 6, parallel={"zero1": True}, pipeline=pipeline, precision=bf16)
        results[overlap] = run(settings, steps=2)
    assert (results[True]["paired"] > 0, results[False]["paired"]) == (True, 0)
    assert_same(results[True], results[False], tolerance=1e-9)


def test_overlapped_pairs_of_megatrons_interleaved_schedule(run, monkeypatch, tmp_path):
    """Its `overlap_moe_expert_parallel_comm`, which is what DualPipe is measured against."""
    from megatron.core.pipeline_parallel import schedules

    plain = schedules.combined_1f1b_schedule_for_interleaved_pipelining

    def seen(*arguments, **options):
        (tmp_path / str(os.getpid())).touch()
        return plain(*arguments, **options)

    monkeypatch.setattr(schedules, "combined_1f1b_schedule_for_interleaved_pipelining", seen)
    results = {}
    for overlap in (False, True):
        layout = {"schedule": "interleaved", "virtual_stages": 2, "layout": LAYOUTS["V", 2], "overlap_pairs": overlap}
        bf16 = {"params": "bf16", "adam_moments": "fp32"}
        settings = recipe("1f1b", "pp2_ep2", 4, parallel={"zero1": True}, pipeline=layout, precision=bf16)
        results[overlap] = run(settings, steps=2)
        assert len(list(tmp_path.iterdir())) == (4 if overlap else 0)
    assert_same(results[True], results[False], tolerance=1e-9)


@pytest.mark.parametrize("mtp", [0, 1])
def test_overlapped_pairs_without_a_pipeline(run, mtp):
    """Megatron-core's too: the all-to-all of experts on one node hides behind the neighbouring micro-batch."""
    results = {}
    for overlap in (False, True):
        settings = tiny(
            model={"num_hidden_layers": 3, "num_nextn_predict_layers": mtp},
            parallel={"world_size": 2, "expert": 2, "zero1": True},
            pipeline={"overlap_pairs": overlap},
            precision={"params": "bf16", "adam_moments": "fp32"},
            schedule={"mtp_weight": 0.3 * mtp},
        )
        results[overlap] = run(settings, steps=1 if mtp else 2)
    if not mtp:
        assert_same(results[True], results[False], tolerance=1e-9)
        return
    assert results[True]["losses"] == results[False]["losses"]
    paired, plain = (results[overlap]["gradients"] for overlap in (True, False))
    errors = {name: float((paired[name] - x).norm() / x.norm()) for name, x in plain.items()}
    # What MTP and the decoder have of its gradient is added up in FP32, where autograd takes BF16.
    assert errors.pop("embedding.word_embeddings.weight") < 2**-8
    assert set(errors.values()) == {0.0}


@pytest.mark.slow
def test_overlapped_pairs_of_the_reports_activations(run):
    """The same with tokens and activations in few bits, and all that the 671B recipe recomputes."""
    results = {}
    for overlap in (False, True):
        few_bits = {"fp8_dispatch": True, "swiglu_input": "fp8", "attention_output": "e5m6"}
        settings = recipe(
            "dualpipe",
            "pp2_ep2",
            6,
            parallel={"zero1": True},
            pipeline={"overlap_pairs": overlap},
            precision={"params": "bf16", "adam_moments": "fp32", **few_bits},
            training={"recompute": ["layernorm", "mla_up_proj", "moe_act"]},
        )
        results[overlap] = run(settings, steps=2)
    assert results[True]["paired"] > 0
    assert_same(results[True], results[False], tolerance=1e-9)
