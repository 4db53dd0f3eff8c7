"""FP8 files whose scales follow rules of their own come back byte for byte, and what was trained by the file's rule."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch

import hf_models
from dsv3_train.checkpoint.directory import resolve
from dsv3_train.checkpoint.hf import fp8, from_hf, scales, to_hf
from dsv3_train.checkpoint.hf.origin import find
from dsv3_train.checkpoint.hf.sides import Published
from dsv3_train.errors import UserError

SIZES = {"hidden_size": 320, "moe_intermediate_size": 136, "n_routed_experts": 4, "n_group": 2, "topk_group": 2}
"""Up to three blocks in a row, cut at the border."""
TRAINED = "model.layers.1.mlp.experts.2.up_proj.weight"


def largest(block: torch.Tensor) -> torch.Tensor:
    return block.abs().max()


def up(scale: torch.Tensor, mantissa: float = 1.0) -> torch.Tensor:
    """The next power of two times a number from 1 to 2."""
    return mantissa * torch.exp2(torch.ceil(torch.log2(scale / mantissa)))


def drawn(block: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """A number that depends on the block alone."""
    return least + (most - least) * (block.sum() * 1e4).frac().abs()


def zeros_are(scale: float):
    """Of a matrix that is zero, as pruned experts are."""
    return lambda block, name: torch.tensor(scale) if ".3.down_proj." in name else largest(block) / 448


RULES = {
    "largest / 448": lambda block, name: largest(block) / 448,
    "a power of two": lambda block, name: up(largest(block) / 448),
    "largest / 240": lambda block, name: largest(block) / 240,
    "largest / 224": lambda block, name: largest(block) / 224,
    "a tenth of head room": lambda block, name: 1.1 * largest(block) / 448,
    "any head room": lambda block, name: drawn(block, 1, 2) * largest(block) / 448,
    "a power of two with head room": lambda block, name: 2 * up(largest(block) / 448),
    "V3.1": lambda block, name: up(largest(block) / 448, 1.3228756 if "o_proj" in name else 1.0),
    "another mantissa": lambda block, name: up(largest(block) / 448, 1.7),
    "one for all": lambda block, name: torch.tensor(2.0**-10 * 1.1),
    "rounded to BF16": lambda block, name: (largest(block) / 448).bfloat16().float(),
    "a power of two below": lambda block, name: torch.exp2(torch.floor(torch.log2(largest(block))) - 8),
    "clipped": lambda block, name: 0.6 * largest(block) / 448,
    "negative": lambda block, name: -largest(block) / 448,
    "zeros with 0": zeros_are(0.0),
    "zeros with 1e-12": zeros_are(1e-12),
}
FOUND = {
    "largest / 448": fp8.Rule(),
    "a power of two": fp8.Rule(mantissa=0.5),
    "largest / 240": fp8.Rule(240),
    "largest / 224": fp8.Rule(224),
    "any head room": None,
    "a power of two with head room": fp8.Rule(224, 0.5),
    "V3.1": fp8.Rule(mantissa=0.5),
    "another mantissa": fp8.Rule(448, pytest.approx(0.85)),
    "rounded to BF16": fp8.Rule(),
    "negative": None,
}
"""Of most tensors; of three blocks no more can be told of the rest."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "hf"
    hf_models.plain(path, mtp=1, **SIZES)
    return path


def directory(plain: Path, path: Path, rule: str) -> Path:
    hf_models.copy(plain, path)
    hf_models.to_fp8(path, 2, RULES[rule], **({"scale_fmt": "ue8m0"} if rule in ("a power of two", "V3.1") else {}))
    if not rule.startswith("zeros"):
        return path
    contents = hf_models.tensors(path)
    for name in contents:
        if name.endswith(".3.down_proj.weight"):
            contents[name] = torch.zeros(contents[name].shape).to(torch.float8_e4m3fn)
    hf_models.rewrite(path, contents, 2)
    return path


def convert_in(source: Path, target: Path, dtype=None) -> dict:
    return from_hf.convert(from_hf.make_plan(source, None, [], None, dtype, "small"), target, 1, lambda *_: None)


def convert_out(run: Path, target: Path) -> None:
    to_hf.convert(to_hf.make_plan(resolve(run), None, None), target, 1, lambda *_: None)


def trains(monkeypatch, name: str, by: float) -> None:
    """Let a conversion change a weight, as a step does."""
    plain_rows = Published.rows

    def rows(self, first, last):
        return plain_rows(self, first, last) * (by if self.weight.name == name else 1.0)

    monkeypatch.setattr(Published, "rows", rows)


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_untouched_bytes(plain, tmp_path, monkeypatch, rule, dtype):
    """Of a checkpoint in FP32, and in the BF16 that training leaves; beside one weight that it has changed."""
    source = directory(plain, tmp_path / "hf", rule)
    report = convert_in(source, tmp_path / "run", dtype)
    assert report["bytes_change"] == []
    if rule in FOUND:
        rules = list(find(resolve(tmp_path / "run")).rules.values())
        assert max(rules, key=rules.count) == FOUND[rule]
        said = "follow no known rule" if FOUND[rule] is None else f"largest / {FOUND[rule].largest:g}"
        assert any(said in note for note in report["notes"])
    if rule == "V3.1":
        own = find(resolve(tmp_path / "run")).rule("model.layers.0.self_attn.o_proj.weight")
        assert own == fp8.Rule(448, pytest.approx(1.3228756 / 2))
    convert_out(tmp_path / "run", tmp_path / "back")
    names = sorted(file.name for file in source.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "back").iterdir())
    assert all(filecmp.cmp(source / name, tmp_path / "back" / name, shallow=False) for name in names)

    trains(monkeypatch, TRAINED, 0.93)
    convert_in(source, tmp_path / "trained", dtype)
    convert_out(tmp_path / "trained", tmp_path / "after")
    before, after = hf_models.tensors(source), hf_models.tensors(tmp_path / "after")
    scale = f"{TRAINED}_scale_inv"
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}
    assert changed <= {TRAINED, scale}
    values = fp8.dequantise(before[TRAINED], before[scale]) * 0.93
    got = fp8.dequantise(after[TRAINED], after[scale])
    assert float((got - values).norm() / values.norm()) < 0.05
    if rule in FOUND and FOUND[rule] is not None:
        rule_found = find(resolve(tmp_path / "trained")).rule(TRAINED)
        assert rule_found == FOUND[rule]
        _, expected = fp8.quantise(values.to(torch.bfloat16 if dtype else torch.float32), rule_found)
        torch.testing.assert_close(after[scale], expected, rtol=2e-2 if rule == "rounded to BF16" else 1e-6, atol=0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_scales_that_lose_codes_are_named(plain, tmp_path):
    """FP32 has no room for codes x 1e-44; the values that are left stay, and so do the other weights' bytes."""
    name = "model.layers.0.self_attn.o_proj.weight"
    source = directory(plain, tmp_path / "hf", "largest / 448")
    contents = hf_models.tensors(source)
    contents[f"{name}_scale_inv"].fill_(1e-44)
    hf_models.rewrite(source, contents, 2)
    report = convert_in(source, tmp_path / "run")
    assert report["bytes_change"] == [name]
    assert any(note.startswith("will not come back byte for byte") and name in note for note in report["notes"])
    convert_out(tmp_path / "run", tmp_path / "back")
    back = hf_models.tensors(tmp_path / "back")
    assert {one for one in contents if not torch.equal(bits(contents[one]), bits(back[one]))} <= {
        name,
        f"{name}_scale_inv",
    }
    both = [fp8.dequantise(of[name], of[f"{name}_scale_inv"]) for of in (contents, back)]
    assert torch.equal(*both)


def test_norms_in_fp32_beside_bf16(plain, tmp_path):
    """As in DeepSeek-V3.2: BF16, in which they train, rounds them; untouched, they come back in full."""
    source = directory(plain, tmp_path / "hf", "largest / 448")
    contents = hf_models.tensors(source)
    norms = [name for name in contents if "norm" in name]
    generator = torch.Generator().manual_seed(3)
    for name in norms:
        contents[name] = 1 + 0.1 * torch.rand(contents[name].shape, generator=generator)
    hf_models.rewrite(source, contents, 2)
    convert_in(source, tmp_path / "run", "bf16")
    convert_out(tmp_path / "run", tmp_path / "back")
    back = hf_models.tensors(tmp_path / "back")
    assert len(norms) > 10
    assert all(torch.equal(bits(back[name]), bits(contents[name])) for name in contents)


def test_files_of_another_writer(plain, tmp_path, monkeypatch):
    """Without metadata, and in an order of its own: the header is kept, and one file stays one."""
    monkeypatch.setattr(to_hf, "_LARGEST_FILE", 1 << 16)
    source = hf_models.copy(plain, tmp_path / "hf")
    header, data = {}, b""
    for name, tensor in sorted(hf_models.tensors(source).items(), reverse=True):
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        raw = bits(tensor).numpy().tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    convert_in(source, tmp_path / "run")
    convert_out(tmp_path / "run", tmp_path / "back")
    assert filecmp.cmp(source / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    plan = to_hf.make_plan(resolve(tmp_path / "run"), "fp8", None)  # of other tensors, which the header is not for
    to_hf.convert(plan, tmp_path / "fp8", 1, lambda *_: None)
    assert len(hf_models.tensors(tmp_path / "fp8")) > len(header)


def test_an_index_without_a_size(plain, tmp_path):
    source = directory(plain, tmp_path / "hf", "largest / 448")
    file = source / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": json.loads(file.read_text())["weight_map"]}))
    convert_in(source, tmp_path / "run")
    convert_out(tmp_path / "run", tmp_path / "back")
    assert filecmp.cmp(file, tmp_path / "back" / file.name, shallow=False)


def test_what_is_kept_is_of_another_model(plain, tmp_path):
    source = directory(plain, tmp_path / "hf", "largest / 448")
    convert_in(source, tmp_path / "run")
    file = tmp_path / "run" / "hf" / "kept.safetensors"
    contents = hf_models.tensors(file.parent)
    from safetensors.torch import save_file

    contents[f"{TRAINED}_scale_inv"] = torch.ones(5, 5)
    save_file(contents, file)
    with pytest.raises(UserError, match=r"kept\.safetensors: what is kept of .*up_proj\.weight is F32 \[5, 5\]"):
        convert_out(tmp_path / "run", tmp_path / "back")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"kept\.safetensors: cut short"):
        convert_out(tmp_path / "run", tmp_path / "back")
    file.unlink()
    with pytest.raises(
        UserError, match=r"damaged \(.*No such file.*kept\.safetensors.*\); remove .*hf to export without"
    ):
        convert_out(tmp_path / "run", tmp_path / "back")


def test_checkpoints_made_before_scales_were_kept(plain, tmp_path):
    """Go back by the rule of `scale_fmt`, as they did then."""
    source = directory(plain, tmp_path / "hf", "a power of two")
    convert_in(source, tmp_path / "run")
    folder = tmp_path / "run" / "hf"
    (folder / "kept.safetensors").unlink()
    facts = json.loads((folder / "tensors.json").read_text())
    (folder / "tensors.json").write_text(json.dumps({key: facts[key] for key in ("main_dtype", "mtp", "exceptions")}))
    convert_out(tmp_path / "run", tmp_path / "back")
    before, after = hf_models.tensors(source), hf_models.tensors(tmp_path / "back")
    same = [torch.equal(before[name], after[name]) for name in before if name.endswith("_scale_inv")]
    assert sum(same) > 0.8 * len(same)  # but for blocks whose largest code is 224


def test_one_block_of_zeros_says_nothing():
    codes = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    assert fp8.find_rule(codes, torch.tensor([[0.3]])) == fp8.USUAL
    assert scales.told({}) == []
