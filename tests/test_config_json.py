"""config.json against the classes of the installed transformers: what is absent, stands twice, or has moved."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_train.checkpoint.hf import config, config_out, rope
from dsv3_train.checkpoint.hf.logits import _scales_softmax, _transformers
from dsv3_train.checkpoint.hf.verify import open_weights
from dsv3_train.errors import UserError
from dsv3_train.recipe.schema import Model

transformers = pytest.importorskip("transformers", minversion="5.24")
TOOL = Path(__file__).parents[1] / "tools" / "config_readers.py"
sys.path.insert(0, str(TOOL.parent))

from config_readers import BASES, Changed, change, classes, filled, make, tokens, write  # noqa: E402

V3, MOONLIGHT, V2 = BASES["V3"], BASES["Moonlight"], BASES["V2-Lite"]


def without(base: dict[str, Any], *keys: str, **changes: Any) -> dict[str, Any]:
    """A copy of `base` that tests may change, without some keys and with others."""
    return json.loads(json.dumps({key: value for key, value in base.items() if key not in keys} | changes))


def rotary(settings: Any) -> tuple[torch.Tensor, float, float]:
    """transformers' inverse frequencies, its scale of cos and sin, and that of YaRN's softmax."""
    kind = f"transformers.models.{settings.model_type}.modeling_{settings.model_type}"
    module = sys.modules.get(kind) or __import__(kind, fromlist=["x"])
    name = "DeepseekV3RotaryEmbedding" if settings.model_type == "deepseek_v3" else "DeepseekV2RotaryEmbedding"
    embedding = getattr(module, name)(settings)
    return embedding.inv_freq, embedding.attention_scaling, module.yarn_apply_mscale(settings.rope_parameters, 1.0)


def scales(model: Model) -> tuple[float, float]:
    """Of cos and sin, and of the softmax, by the report's YaRN from a recipe's numbers."""
    one = model.rope_scaling
    if one is None:
        return 1.0, 1.0
    top, bottom = (0.1 * m * math.log(one.factor) + 1 for m in (one.mscale, one.mscale_all_dim))
    return top / bottom, bottom**2


def assert_same(ours: Model, made: dict[str, Any]) -> None:
    """Every setting and what RoPE comes to, as transformers' class reads them."""
    theirs = classes(made)[0].from_dict(without(made))
    greedy = made["model_type"] == "deepseek_v2"
    for key, value in ours.model_dump().items():
        if key in ("scoring_func", "rope_scaling", "rope_theta") or (greedy and key in ("n_group", "topk_group")):
            continue
        expected = 0 if greedy and key == "num_nextn_predict_layers" else getattr(theirs, key)
        if key == "first_k_dense_replace":
            expected = min(expected, theirs.num_hidden_layers)
        assert value == expected, key
    inv_freq, cos, softmax = rotary(theirs)
    assert scales(ours) == pytest.approx((cos, softmax), rel=1e-12)
    # Written anew under the names of the published files, they come to the same.
    again = rotary(classes(made)[0].from_dict(config_out.config_of(ours, 0, theirs.max_position_embeddings)))
    assert torch.equal(again[0], inv_freq)
    assert again[1:] == pytest.approx((cos, softmax), rel=1e-12)


def refused(made: dict[str, Any]) -> str:
    """What is said to it, nothing if it is read."""
    try:
        config.model(without(made), "config.json")
    except UserError as error:
        return str(error)
    return ""


def fails(made: dict[str, Any]) -> bool:
    """Whether transformers has no model of it either."""
    kind, model = classes(made)
    try:
        settings = kind.from_dict(without(made))
        rotary(settings)
        with torch.device("meta"):
            built = model(settings)(torch.zeros(1, 2, dtype=torch.long))
        return built is None
    except Exception:
        return True


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(seed):
    """Keys removed, doubled and moved: read as transformers does, unless they contradict each other."""
    generator, read = random.Random(seed), 0
    for _ in range(100):
        made = change(generator)
        if refusal := refused(made.config):
            assert made.contradicts or fails(made.config), (made.said, refusal)
            assert all(line.startswith("config.json: ") for line in refusal.splitlines())
            continue
        assert not made.contradicts, made.said
        read += 1
        assert_same(config.model(without(made.config), "config.json"), made.config)
    assert read >= 75


@pytest.mark.parametrize("base", BASES)
def test_every_key_removed(base):
    """One after the other: its class's default, or the key's name where the class has none."""
    for key in BASES[base]:
        made = without(BASES[base], key)
        if key == "model_type":
            continue
        if (base, key) == ("V2-Lite", "num_experts_per_tok"):
            with pytest.raises(UserError, match=r"^config.json: num_experts_per_tok: missing"):
                config.model(made, "config.json")
        elif key == "num_attention_heads":  # and num_key_value_heads says 2
            with pytest.raises(UserError, match=r"^config.json: num_key_value_heads: 2 of (128|32) heads"):
                config.model(made, "config.json")
        else:
            assert_same(config.model(made, "config.json"), made)


def test_nothing_but_the_type():
    assert_same(config.model({"model_type": "deepseek_v3"}, "config.json"), {"model_type": "deepseek_v3"})


YARN = V3["rope_scaling"]
NOTED = {
    "rope_parameters beside rope_scaling": (
        without(V3, rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
        ["rope_scaling and rope_parameters disagree on ", "rope_theta, rope_type", "rope_scaling is used"],
    ),
    "yarn in rope_parameters": (
        without(V3, "rope_scaling", rope_parameters=YARN),
        ["has YaRN only in rope_parameters", "before version 5"],
    ),
    "theta in rope_parameters": (
        without(MOONLIGHT, "rope_scaling", "rope_theta", rope_parameters={"rope_theta": 777.0}),
        ["has rope_theta only in rope_parameters"],
    ),
    "theta in rope_scaling": (
        without(V3, "rope_theta", rope_scaling={**YARN, "rope_theta": 777.0}),
        ["has rope_theta only in rope_scaling"],
    ),
    "mscale_all_dim alone": (
        without(V3, rope_scaling={key: value for key, value in YARN.items() if key != "mscale"}),
        ["mscale_all_dim without mscale", "1.3689", "DeepSeek's own code takes mscale 1"],
    ),
    "mscale alone": (
        without(V3, rope_scaling={**V2["rope_scaling"], "mscale": 0.707}),
        ["mscale 0.707 without mscale_all_dim"],
    ),
    "no original length": (
        without(V3, rope_scaling={"type": "yarn", "factor": 4.0}),
        ["max_position_embeddings (8192) is used", "DeepSeek's own code takes 4096"],
    ),
    "original length at the top": (
        without(V3, rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=64),
        ["original_max_position_embeddings beside rope_scaling"],
    ),
    "another name": (without(V3, "n_routed_experts", num_local_experts=32), ["n_routed_experts as num_local_experts"]),
    "two types of numbers": (without(V3, dtype="bfloat16"), ["dtype bfloat16 and torch_dtype float32", "takes dtype"]),
}


@pytest.mark.parametrize("case", NOTED)
def test_noted(case):
    """Read as transformers 5.24 does, and said where another reader takes it otherwise or something does not hold."""
    made, parts = NOTED[case]
    (note,) = config.notes(made)
    assert all(part in note for part in parts), note
    config.model(made, "config.json")
    settings = classes(made)[0].from_dict(without(made))
    if "original length" not in case:  # at the top it reaches transformers' RoPE when the model is built
        assert_same(config.model(made, "config.json"), made)
    else:
        rotary(settings)
        expected = settings.rope_parameters["original_max_position_embeddings"]
        assert config.model(made, "config.json").rope_scaling.original_max_position_embeddings == expected


def test_files_that_all_read_alike_have_no_notes():
    for base in BASES.values():
        assert config.notes(base) == []
    assert config.notes(without(V3, rope_parameters={**YARN, "rope_theta": V3["rope_theta"]})) == []


REFUSED = {
    "two thetas": (
        without(V3, rope_parameters=None, rope_scaling={**YARN, "rope_theta": 1.0}),
        "rope_theta: 50000.0 at the top level, but 1.0 in rope_scaling",
    ),
    "two types of RoPE": (
        without(V3, rope_scaling={**YARN, "rope_type": "default"}),
        "rope_scaling: rope_type 'default'",
    ),
    "yarn without a type": (
        without(V3, rope_scaling={"factor": 4.0, "beta_fast": 32}),
        "rope_scaling: has beta_fast, factor, but no type",
    ),
    "two original lengths": (
        without(V3, original_max_position_embeddings=128),
        "original_max_position_embeddings: 128 at the top level, but 64 in rope_scaling",
    ),
    "RoPE of each kind of layer": (
        without(V3, rope_scaling={"full_attention": YARN}),
        "rope_scaling: has settings for each",
    ),
    "a part turned": (without(V3, partial_rotary_factor=0.5), "partial_rotary_factor: is not supported"),
    "truncate null": (
        without(V3, rope_scaling={**YARN, "truncate": None}),
        "rope_scaling: attention_factor and truncate",
    ),
    "experts under two names": (
        without(V3, num_local_experts=64),
        "n_routed_experts: 32, but num_local_experts, which means the same, is 64",
    ),
    "a head's width": (without(V3, head_dim=12), "head_dim: 12, but qk_rope_head_dim is 8"),
    "a key's width": (without(V3, qk_head_dim=12), "qk_head_dim: 12, but qk_nope_head_dim + qk_rope_head_dim is 24"),
    "V3 with softmax": (without(V3, scoring_func="softmax"), "scoring_func: 'softmax' is not supported"),
    "V3 chosen greedily": (without(V3, topk_method="greedy"), "topk_method: 'greedy' is not supported"),
    "V2 with sigmoid": (without(V2, scoring_func="sigmoid"), "scoring_func: 'sigmoid' is not supported"),
    "V2 normed": (without(V2, norm_topk_prob=True), "norm_topk_prob: True is not supported"),
    "halves turned": (without(V3, rope_interleave=None), "rope_interleave: None is not supported"),
    "layers that differ": (without(V3, per_layer_config={"0": {}}), "per_layer_config: {'0': {}} is not supported"),
    "null for groups": (without(V3, n_group=None), "n_group: must be an integer, got null"),
    "a list for a type": (without(V3, model_type=["deepseek_v3"]), "model_type: ['deepseek_v3'] is not supported"),
    "a list for RoPE's type": (
        without(V3, rope_scaling={**YARN, "type": ["yarn"]}),
        "rope_scaling: type ['yarn'] is not",
    ),
    "INT4": (
        without(V3, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        'quantization_config: quant_method "compressed-tensors", format "pack-quantized" is not supported',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    made, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        config.model(made, "config.json")
    assert str(error.value).startswith(f"config.json: {message}")
    assert "\n" not in str(error.value)


def test_null_for_what_transformers_does_not_look_at():
    assert config.model(without(V3, scoring_func=None, topk_method=None), "config.json") == config.model(V3, "")
    assert config.model(without(V2, scoring_func=None), "config.json") == config.model(V2, "")


def test_groups_that_decide_nothing():
    """Greedily chosen, or with all groups taken: DeepSeek-V2's router, for which this model has none."""
    for changes in (
        {"n_group": 8, "topk_group": 3},
        {"n_group": 4, "topk_group": 4, "topk_method": "group_limited_greedy"},
    ):
        model = config.model(without(V2, **changes), "config.json")
        assert (model.n_group, model.topk_group) == (1, 1)


def test_a_file_that_says_a_thing_twice(tmp_path):
    """JSON leaves it open which holds: alike they are read, else refused."""
    for second, fine in (("4", True), ("8", False)):
        text = json.dumps(V3).replace('"n_group": 4', f'"n_group": 4, "n_group": {second}')
        (tmp_path / "config.json").write_text(text)
        if fine:
            assert config.read(tmp_path) == V3
            continue
        with pytest.raises(UserError, match=r"config\.json: n_group: is there twice, as 4 and 8"):
            config.read(tmp_path)


TEXT = without(MOONLIGHT, "model_type", "num_nextn_predict_layers", rope_theta=800000.0)
KIMI_VL = {"model_type": "kimi_vl", "vision_config": {"hidden_size": 8}, "vocab_size": 64, "text_config": TEXT}
"""As published: the language model's settings without a type, some of them at the top too."""


def test_kimi_vls_language_model():
    assert_same(config.model(KIMI_VL, "config.json"), {**TEXT, "model_type": "deepseek_v3"})
    fewer = {**KIMI_VL, "text_config": without(TEXT, "routed_scaling_factor")}
    assert config.model(fewer, "config.json").routed_scaling_factor == 2.5
    for text, message in (
        (without(TEXT, vocab_size=65), "text_config.vocab_size: 65 in text_config, but 64 beside it"),
        (without(TEXT, n_group="1"), 'text_config.n_group: must be an integer, got "1"'),
        (without(TEXT, rope_scaling={"type": "linear"}), "text_config.rope_scaling: type 'linear' is not supported"),
        (None, "text_config: must be an object"),
    ):
        with pytest.raises(UserError) as error:
            config.model({**KIMI_VL, "text_config": text}, "config.json")
        assert str(error.value).startswith(f"config.json: {message}")


def test_kimi_k2_is_read_as_a_deepseek_v3():
    made = without(V3, "n_group", "topk_group", "routed_scaling_factor")
    assert config.model({**made, "model_type": "kimi_k2"}, "config.json") == config.model(made, "config.json")


MOVED = {
    "rope_parameters": without(V3, "rope_scaling", "rope_theta", rope_parameters={**YARN, "rope_theta": 777.0}),
    "theta in rope_scaling": without(V3, "rope_theta", rope_scaling={**YARN, "rope_theta": 777.0}),
    "original length": without(V3, rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=64),
    "another name": without(V3, "n_routed_experts", num_local_experts=32),
    "Kimi-VL": {**KIMI_VL, "torch_dtype": "float32"},
    "both dtypes": without(V3, dtype="bfloat16"),
}


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("changed", [False, True])
def test_the_way_out(case, changed):
    """Written again it says the same model where transformers 4 looks too, and what the run has changed."""
    made = MOVED[case]
    model = config.model(made, "config.json", 0)
    if changed:
        scaling = {"factor": 8.0, "original_max_position_embeddings": 128}
        changes = {"routed_scaling_factor": 3.5, "rope_theta": 5.0, "rope_scaling": scaling}
        model = Model.model_validate({**model.model_dump(), **changes})
    written = config_out.updated(made, model, 0, "bf16")
    assert config.model(written, "config.json") == model
    own = written.get("text_config", written)
    assert rope.known_to_all(own)
    assert [note for note in config.notes(written) if "RoPE" in note or "rope_theta" in note] == []
    assert own.get("rope_theta") == model.rope_theta
    assert {written[key] for key in ("dtype", "torch_dtype") if key in written} == {"bfloat16"}
    assert made.keys() <= written.keys()
    assert own["n_routed_experts"] == model.n_routed_experts
    assert "model_type" not in written.get("text_config", {})


def test_defaults_are_written_out():
    """The versions of transformers differ on V2's vocabulary: 32000 and 102400."""
    made = without(V2, "vocab_size", "routed_scaling_factor")
    written = config_out.updated(made, config.model(made, "config.json"), None, "bf16")
    assert {key: written[key] for key in written.keys() - made.keys()} == {
        "vocab_size": 102400,
        "routed_scaling_factor": 1.0,
    }


def test_what_still_holds_stays_as_it_is():
    """Of another type of numbers, no key but that changes."""
    for made in (V3, MOONLIGHT, V2):
        model = config.model(made, "config.json")
        assert config_out.updated(made, model, None, "bf16") == {**made, "torch_dtype": "bfloat16"}


V2_LITE = without(V2, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707})
KIMI_K2 = without(V3, rope_scaling={**YARN, "beta_fast": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0})


def test_logits_of_changed_files(tmp_path):
    """The model that is made of the settings, by the tool's own process; transformers' of the same file here."""
    make(tmp_path, 6, 4)
    for number, made in enumerate([V2_LITE, KIMI_K2], 6):
        kind, model_of = classes(made)
        write(tmp_path / f"{number:02d}", filled(model_of(kind.from_dict(without(made))), 0), Changed("", made, []))
    done = subprocess.run([sys.executable, str(TOOL), "ours", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compared = []
    for path in sorted(tmp_path.iterdir()):
        if (path / "ours.pt").is_file():
            expected = _transformers(open_weights(path))(tokens(path))
            torch.testing.assert_close(torch.load(path / "ours.pt"), expected, rtol=0, atol=1e-5)
            compared.append(path.name)
    assert len(compared) >= 6
    assert compared[-2:] == ["06", "07"]


def test_transformers_v2_has_yarns_softmax_scale():
    """5.24 does, 4.57 does not; verify runs the former."""
    kind, model_of = classes(V2_LITE)
    with torch.device("meta"):
        model = model_of(kind.from_dict(without(V2_LITE)))
    ours = config.model(V2_LITE, "config.json")
    assert _scales_softmax(model, ours)
    for layer in model.model.layers:
        layer.self_attn.scaling = 24**-0.5  # as 4.57 leaves it
    assert not _scales_softmax(model, ours)


def test_a_language_model_of_unknown_type():
    """Without a `model_type` only Kimi-VL's is known; Kimi-K2.5 names its own."""
    assert config.model({**KIMI_VL, "model_type": "kimi_k25", "text_config": {**TEXT, "model_type": "kimi_k2"}}, "c")
    for text, found in ((TEXT, "None"), ({**TEXT, "model_type": "llama"}, "'llama'")):
        with pytest.raises(UserError, match=rf"^c: text_config\.model_type: {found} is not supported"):
            config.model({**KIMI_VL, "model_type": "llava", "text_config": text}, "c")
