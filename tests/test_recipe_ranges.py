"""Each number of a recipe: the edges of its range are taken, their neighbours refused in one line."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from dsv3_train.errors import UserError
from dsv3_train.recipe.load import build, load, schema, values
from dsv3_train.recipe.schema import Recipe

TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")
_TINY = values(load(TINY))
WIDTH, PROCESSES, POSITIONS, EXPERTS = (1, 1 << 20), (1, 1 << 20), (1, 1 << 24), (1, 1 << 14)
TIMES, SOME, SEED = (0, 10**15), (1, 10**15), (-(1 << 62), 1 << 62)

# The smallest and the largest value of each key. Of floats, an open end is the number next to what is refused.
RANGES: dict[str, tuple[float, float]] = {
    "model.vocab_size": (1, 1 << 24),
    "model.hidden_size": WIDTH,
    "model.num_hidden_layers": (1, 1000),
    "model.num_attention_heads": WIDTH,
    "model.intermediate_size": WIDTH,
    "model.moe_intermediate_size": WIDTH,
    "model.first_k_dense_replace": (0, 1000),
    "model.n_routed_experts": EXPERTS,
    "model.n_shared_experts": (0, 1024),
    "model.num_experts_per_tok": EXPERTS,
    "model.n_group": EXPERTS,
    "model.topk_group": EXPERTS,
    "model.routed_scaling_factor": (1e-3, 1e3),
    "model.q_lora_rank": WIDTH,
    "model.kv_lora_rank": WIDTH,
    "model.qk_nope_head_dim": WIDTH,
    "model.qk_rope_head_dim": WIDTH,
    "model.v_head_dim": WIDTH,
    "model.num_nextn_predict_layers": (0, 100),
    "model.rms_norm_eps": (1e-12, 0.1),
    "model.initializer_range": (1e-8, 10.0),
    "model.rope_theta": (1.0, 1e12),
    "model.rope_scaling.factor": (1.0, 1e4),
    "model.rope_scaling.original_max_position_embeddings": POSITIONS,
    "model.rope_scaling.beta_fast": (1e-3, 1e6),
    "model.rope_scaling.beta_slow": (1e-3, 1e6),
    "model.rope_scaling.mscale": (0.0, 100.0),
    "model.rope_scaling.mscale_all_dim": (0.0, 100.0),
    "parallel.world_size": PROCESSES,
    "parallel.gpus_per_node": PROCESSES,
    "parallel.tensor": PROCESSES,
    "parallel.pipeline": (1, 1000),
    "parallel.context": PROCESSES,
    "parallel.expert": PROCESSES,
    "parallel.expert_tensor": PROCESSES,
    "pipeline.virtual_stages": (1, 1000),
    "pipeline.communication_sms": (0, 1024),
    "data.prepare.vocab_size": (1, 1 << 24),
    "data.prepare.fim_rate": (0.0, 1.0),
    "data.prepare.seed": SEED,
    "data.prepare.max_bad": (0.0, 1.0),
    "data.train.0.weight": (1e-9, 1e9),
    "data.valid.0.weight": (1e-9, 1e9),
    "data.valid_fraction": (0.0, math.nextafter(1.0, 0.0)),
    "data.seed": (0, 4_000_000_000),
    "data.workers": (0, 1024),
    "optim.beta1": (0.0, 0.999999),
    "optim.beta2": (0.0, 0.999999),
    "optim.eps": (1e-30, 1.0),
    "optim.weight_decay": (0.0, 100.0),
    "optim.clip_grad_norm": (0.0, 1e6),
    "optim.ema_decay": (math.nextafter(0.0, 1.0), 0.999999),
    "schedule.lr": (0.0, 100.0),
    "schedule.batch_size": (1, 1e9),
    "schedule.mtp_weight": (0.0, 1e3),
    "schedule.bias_update_speed": (0.0, 1.0),
    "schedule.balance_loss": (0.0, 1e3),
    "training.duration": (1, 10**18),
    "training.sequence_length": POSITIONS,
    "training.micro_batch_size": (1, 10**9),
    "training.seed": SEED,
    "training.eval_interval": TIMES,
    "training.eval_sequences": (1, 10**9),
    "checkpoint.interval": TIMES,
    "checkpoint.keep_last": SOME,
    "faults.max_restarts": TIMES,
    "faults.hang_seconds": (0.0, 1e7),
    "faults.join_seconds": (math.nextafter(0.0, 1.0), 1e7),
    "faults.slow_factor": (math.nextafter(1.0, 2.0), 1e6),
    "faults.stop_lead_seconds": (1, 10**7),
    "faults.max_unusable": SOME,
    "faults.spike": (math.nextafter(0.0, 1.0), 1e6),
    "faults.spike_window": (8, 10**6),
    "faults.spike_batches": SOME,
    "faults.max_rollbacks": TIMES,
    "faults.rerun_interval": TIMES,
    "faults.compare_interval": TIMES,
    "logging.interval": SOME,
    "logging.expert_load_interval": TIMES,
    "logging.pipeline_interval": TIMES,
    "logging.trace_interval": TIMES,
}


def faults(key: str, value: object) -> list[str]:
    """What is said of the key alone; what depends on other keys may be wrong with an edge."""
    plain = copy.deepcopy(_TINY)
    plain["model"]["rope_scaling"] = {"factor": 40.0}
    plain["data"] |= {"prepare": {"inputs": ["x"], "output": "y"}}
    for name in ("train", "valid"):
        plain["data"][name] = [{"path": "z"}]
    at: Any = plain
    *above, last = (int(step) if step.isdigit() else step for step in key.split("."))
    for step in above:
        at = at[step]
    at[last] = value
    try:
        build(plain, "r.yaml")
    except UserError as error:
        return [line for line in str(error).splitlines() if line.startswith(f"r.yaml: {key}")]
    return []


def out_of_range(key: str, value: object) -> bool:
    return any("must be" in line or "must not be" in line or "more than 1e+18" in line for line in faults(key, value))


@pytest.mark.parametrize("key", RANGES)
def test_edges_are_taken_and_their_neighbours_refused(key):
    low, high = RANGES[key]
    assert not out_of_range(key, low)
    assert not out_of_range(key, high)
    if isinstance(high, float) and key != "schedule.batch_size":
        below, above = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    else:
        below, above = low - 1, int(high) + 1
    for value in (above, 10**30, 10**400, float("inf"), float("nan")):
        assert len(faults(key, value)) == 1, value
    if key == "schedule.batch_size":
        assert "fewer than" in faults(key, below)[0]
    elif key == "training.duration":
        assert "longer than nothing" in faults(key, below)[0]
    else:
        assert out_of_range(key, below)


def numbers(kind: dict, defs: dict, path: str = "") -> list[tuple[str, dict]]:
    """(key, JSON schema) of each number below a section."""
    found = []
    for name, field in kind.get("properties", {}).items():
        for option in [field, *field.get("anyOf", []), *field.get("allOf", [])]:
            key = f"{path}{name}"
            if "$ref" in option:
                found += numbers(defs[option["$ref"].rsplit("/", 1)[1]], defs, f"{key}.")
            elif "$ref" in option.get("items", {}) and not key.startswith("schedule."):
                found += numbers(defs[option["items"]["$ref"].rsplit("/", 1)[1]], defs, f"{key}.0.")
            elif option.get("type") in ("integer", "number"):
                found.append((key, option))
    return found


def test_no_number_is_without_a_range():
    described = schema()
    found = dict(numbers(described, described["$defs"]))
    assert set(found) == set(RANGES)
    by_checks = {
        "training.duration",
        *(f"schedule.{name}" for name in Recipe.model_fields["schedule"].annotation.model_fields),
    }
    for key, option in found.items():
        if key not in by_checks:
            assert {"minimum", "exclusiveMinimum"} & set(option), key
            assert {"maximum", "exclusiveMaximum"} & set(option), key


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["schedule.lr=20", "optim.weight_decay=0.1"], "optim.weight_decay"),
        (["optim.clip_grad_norm=1e-9"], "optim.clip_grad_norm"),
        (["model.rope_scaling={factor: 40, beta_fast: 1, beta_slow: 2}"], "model.rope_scaling.beta_slow"),
    ],
)
def test_values_that_undo_one_another(overrides, key):
    with pytest.raises(UserError, match=f": {key}: "):
        load(TINY, overrides)
