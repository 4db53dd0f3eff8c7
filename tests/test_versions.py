"""Megatron-core's version is asked for in one file, and what that file finds is what is installed."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_train.runtime import distributed, megatron_versions

ROOT = Path(__file__).parent.parent
HOME = "dsv3_train/runtime/megatron_versions.py"
SOURCES = sorted(path for room in ("dsv3_train", "cli") for path in (ROOT / room).rglob("*.py"))
FUNCTIONS = {"older_than", "is_te_min_version", "is_torch_min_version", "get_te_version"}
VERSIONS = {"__version__", "version_info", "version", "Version", "parse_version"}


def comparisons(source: str) -> list[int]:
    """Lines that compare a version of something, or call a function that does."""

    def names(node: ast.AST) -> set[str]:
        inner = list(ast.walk(node))
        return {x.id for x in inner if isinstance(x, ast.Name)} | {
            x.attr for x in inner if isinstance(x, ast.Attribute)
        }

    def asks(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return bool(names(node.func) & FUNCTIONS)
        ordered = isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
        return ordered and bool(names(node) & VERSIONS)

    return [node.lineno for node in ast.walk(ast.parse(source)) if asks(node)]


@pytest.mark.parametrize(
    "line",
    [
        "if older_than(0, 17): pass",
        "if Version(torch.__version__) >= Version('2.13'): pass",
        "if metadata.version('megatron-core') < '0.17': pass",
        "new = sys.version_info >= (3, 12)",
        "if utils.is_te_min_version('2.20'): pass",
    ],
)
def test_a_comparison_is_seen(line):
    assert comparisons(line) == [1]


def test_no_version_is_asked_for_elsewhere():
    found = {}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if lines := comparisons(path.read_text(encoding="utf-8")):
            found[name] = lines
    assert found.pop(HOME)
    assert not found


def test_queries_without_a_latent_have_no_norm():
    """As Transformer Engine's layers are specified, which no CPU can build; tests/test_dry_run.py builds local ones."""
    distributed.prepare_import("cpu")
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.identity_op import IdentityOp

    if not hasattr(multi_latent_attention, "QKNormConfigResolver"):
        pytest.skip("before 0.19 latents alone are normed")
    megatron_versions.keep_query_without_norm()
    plain, fused = type("Plain", (), {}), type("Fused", (), {})
    config = SimpleNamespace(q_lora_rank=None, qk_layernorm=True, qk_l2_norm=False, experimental_attention_variant=None)
    config.normalization, config.transformer_impl = "RMSNorm", "local"
    parts = {"linear_q_proj": plain, "linear_q_up_proj": fused, "linear_kv_up_proj": fused}
    resolver = multi_latent_attention.QKNormConfigResolver(
        config, SimpleNamespace(q_layernorm=IdentityOp, kv_layernorm=IdentityOp, **parts)
    )
    resolver.fused_norm_linear_impl = fused
    theirs = type(resolver).__mro__[1].resolve(resolver)
    assert theirs["linear_q_proj"] is fused, "the patch is no longer needed: take it out"
    ours = resolver.resolve()
    assert ours == {**theirs, "linear_q_proj": plain, "linear_q_up_proj": fused}
