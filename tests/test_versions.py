"""Megatron-core's version is asked for in one file, and what that file finds is what is installed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
