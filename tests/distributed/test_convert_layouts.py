"""Converted models compute what transformers does, in any layout; what is saved there goes back as it was.

FP32 on a CPU; a tolerance of 1e-5 of the logits' norm is for sums that run in another order.
"""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve, step_path
from dsv3_train.checkpoint.hf import from_hf, to_hf
from dsv3_train.recipe.load import load
from dsv3_train.runtime import distributed
from parity import in_processes

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS = 48
LAYOUTS = {
    "one": (),
    "pp2": ("parallel.world_size=2", "parallel.pipeline=2"),
    "ep2": ("parallel.world_size=2", "parallel.expert=2"),
    "tp2": ("parallel.world_size=2", "parallel.tensor=2"),
    "pp2_uneven": ("parallel.world_size=2", "parallel.pipeline=2", "pipeline.layout=Ettt|tmL"),
}
YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
SHAPES = {
    "no_query_latent": {"q_lora_rank": None, "first_k_dense_replace": 3},
    "ungrouped": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 2},
    "groups_of_one_choice": {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 4},
    "moonlight": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-3, "rope_theta": 50000.0},
    "yarn": YARN,
    "yarn_by_attention": {"rope_scaling": {**YARN["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 1.2}},
    "all_dense": {"first_k_dense_replace": 4},
}


def tokens() -> torch.Tensor:
    return torch.randint(0, hf_models.SMALL["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", autouse=True)
def _imports():
    distributed.prepare_import("cpu")
    import dsv3_train.checkpoint.hf.fill
    import dsv3_train.checkpoint.load
    import dsv3_train.model.build  # noqa: F401  once, before forking


def convert(source: Path, target: Path) -> Path:
    plan = from_hf.make_plan(source, None, [], None, None, "small")
    from_hf.convert(plan, target, 1, lambda *_: None)
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with MTP: its directory, the converted run, and transformers' logits."""
    where = tmp_path_factory.mktemp("small")
    model = hf_models.save(where / "hf")
    hf_models.add_mtp(where / "hf", shards=3)
    with torch.no_grad():
        logits = model(tokens()).logits
    return where / "hf", convert(where / "hf", where / "run"), logits


def logits_of(
    run: Path, out: Path, overrides: tuple[str, ...] = (), hugging_face: Path | None = None, save: bool = False
) -> dict[str, torch.Tensor]:
    """Our model's logits and MTP's, from the checkpoint in `run` or straight from files; may `save` it anew."""
    recipe = load(str(run / "recipe.yaml"), ["parallel.zero1=false", "runtime.device=cpu", *overrides])

    def save_again(model) -> None:
        from megatron.core import dist_checkpointing

        from dsv3_train.checkpoint.state import model_state

        saved = step_path(out / "checkpoints", 1)
        if torch.distributed.get_rank() == 0:
            saved.mkdir(parents=True)
        torch.distributed.barrier()
        position = {"step": 1, "consumed_samples": 0, "consumed_tokens": 0}
        dist_checkpointing.save({**model_state([model]), "position": position, "topology": {}}, str(saved))

    @torch.no_grad()
    def work() -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        from dsv3_train.checkpoint.hf.fill import load_published
        from dsv3_train.checkpoint.load import load_weights
        from dsv3_train.model.build import build_chunks
        from dsv3_train.model.config import megatron_config

        distributed.start(recipe, "cpu")
        (model,) = build_chunks(recipe, megatron_config(recipe, "cpu"))
        model.eval()
        if hugging_face:
            load_published(hugging_face, recipe, [model])
        else:
            load_weights(resolve(run), [model])
        if not model.pre_process:
            hidden = torch.empty(TOKENS, 1, recipe.model.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        logits = []  # MTP's, then the main model's
        if model.post_process:
            model.output_layer.register_forward_hook(lambda module, inputs, output: logits.append(output[0].clone()))
        result = model(tokens(), torch.arange(TOKENS)[None], None, labels=tokens())
        if not model.post_process:
            torch.distributed.send(result.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        whole = [gather_from_tensor_model_parallel_region(one).transpose(0, 1) for one in logits]
        if (
            whole
            and parallel_state.get_data_parallel_rank() == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        ):
            torch.save({"logits": whole[-1], "mtp": whole[0]}, out / "logits.pt")
        if save:
            save_again(model)
        distributed.stop()

    in_processes(work, recipe.parallel.world_size)
    text = (run / "recipe.yaml").read_text()
    assert "  load: null\n" in text
    (out / "recipe.yaml").write_text(text.replace("  load: null\n", f"  load: {run}\n"))
    return torch.load(out / "logits.pt")


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((got - expected).norm() / expected.norm()) < TOLERANCE


def assert_same_files(one: Path, other: Path) -> None:
    """Every file of the two directories, byte for byte."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(small, tmp_path, layout):
    """Logits; and the checkpoint that is saved in that layout goes back to the very files."""
    source, run, expected = small
    got = logits_of(run, tmp_path, LAYOUTS[layout], save=True)
    assert_close(got["logits"], expected)
    plan = to_hf.make_plan(resolve(tmp_path), None, None)
    to_hf.convert(plan, tmp_path / "back", 1, lambda *_: None)
    assert_same_files(source, tmp_path / "back")


@pytest.mark.parametrize("layout", ["tp2", "pp2_uneven", "ep2"])
def test_straight_from_the_files(small, tmp_path, layout):
    source, run, expected = small
    assert_close(logits_of(run, tmp_path, LAYOUTS[layout], hugging_face=source)["logits"], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape(tmp_path, shape):
    model = hf_models.save(tmp_path / "hf", **SHAPES[shape])
    with torch.no_grad():
        expected = model(tokens()).logits
    (tmp_path / "out").mkdir()
    assert_close(logits_of(convert(tmp_path / "hf", tmp_path / "run"), tmp_path / "out")["logits"], expected)


def test_softmax_router_without_bias(tmp_path):
    """DeepSeek-V2-Lite's: transformers has it as another model."""
    keys = ("num_nextn_predict_layers",)
    settings = {key: value for key, value in hf_models.SMALL.items() if key not in keys}
    settings |= {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    }
    config = transformers.DeepseekV2Config(**settings, topk_method="greedy", attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.DeepseekV2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    assert_close(logits_of(convert(tmp_path / "hf", tmp_path / "run"), tmp_path / "out")["logits"], expected)


def test_mtp_by_the_reports_equations(small, tmp_path):
    """Report, section 2.2: h' = TRM(M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)]), P = OutHead(h'), of the files' tensors.

    The published files have the embedding first, the report the state; h_i is what the main model's head sees.
    """
    source, run, _ = small
    got = logits_of(run, tmp_path)["mtp"]
    tensors = hf_models.tensors(source)
    model = hf_models.reference()
    layer = f"model.layers.{hf_models.SMALL['num_hidden_layers']}."

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[f"{layer}{name}.weight"]

    with torch.no_grad():
        h = model.model(tokens()).last_hidden_state[:, :-1]
        embedded = tensors["model.embed_tokens.weight"][tokens()[:, 1:]]
        joined = torch.cat([norm(embedded, "enorm"), norm(h, "hnorm")], -1) @ tensors[f"{layer}eh_proj.weight"].T
        # transformers' own block, as a further layer of a model that is otherwise the same.
        deeper = hf_models.reference(num_hidden_layers=hf_models.SMALL["num_hidden_layers"] + 1)
        block = deeper.model.layers[-1]
        own = {name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}
        experts = [own.pop(f"mlp.experts.{e}.{part}_proj.weight") for e in range(16) for part in ("gate", "up", "down")]
        own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(experts[3 * e : 3 * e + 2]) for e in range(16)])
        own["mlp.experts.down_proj"] = torch.stack(experts[2::3])
        missing, _ = block.load_state_dict(own, strict=False)
        assert not missing
        length = joined.size(1)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        rotary = deeper.model.rotary_emb(joined, torch.arange(length)[None])
        out = block(joined, attention_mask=mask, position_embeddings=rotary)
        expected = norm(out, "shared_head.norm") @ tensors["lm_head.weight"].T
    assert_close(got[:, :-1], expected)
