"""The validator's errors, in the words of someone who writes recipes."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from dsv3_train.recipe.faults import Fault, dotted
from dsv3_train.recipe.keys import meant, names, nearest, wanted
from dsv3_train.recipe.schema import Recipe, Segment
from dsv3_train.recipe.yaml_source import Node, scalar

_MOST = 100  # faults that are explained; nobody reads more
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def faults_of(error: ValidationError, root: Node) -> list[Fault]:
    """Every error as a fault at the line, or the override, that caused it."""
    faults, corrected = [], set()
    details = error.errors(include_url=False)
    for detail in details[:_MOST]:
        path = _path(detail, root)
        if detail["type"] == "extra_forbidden":
            advice, instead = meant(path)
            corrected.add(instead)
            faults.append((path, advice))
        else:
            faults.append((path, _message(detail, path)))
    # A required key under a misspelt name is one fault, not two.
    found = [
        Fault(root.nearest(path)[0].place, dotted(path), message)
        for path, message in faults
        if not (path in corrected and message.startswith("missing"))
    ]
    if len(details) > _MOST:
        found.append(Fault(root.place, "", f"and {len(details) - _MOST} more faults"))
    return found


def _path(detail: Any, root: Node) -> tuple[str | int, ...]:
    """Where the fault is, as written: without the validator's own steps."""
    is_unknown = detail["type"] == "extra_forbidden"
    loc = detail["loc"]
    path = tuple(
        step
        for i, step in enumerate(loc)
        if isinstance(step, int) or "[" not in step or (is_unknown and i == len(loc) - 1)
    )
    node, depth = root.nearest(path)
    # A plain number stands for a schedule of one piece; a pair's missing entry is a fault of the pair.
    if depth < len(path) and not isinstance(node.value, dict):
        return path[:depth]
    return path


def _message(detail: Any, path: tuple[str | int, ...]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        if path and isinstance(detail["loc"][-1], int):
            return "must be two numbers, [from, to]"
        return f"missing; {_needs(wanted(path))}"
    return f"{_expected(kind, context, value, path)}{_advice(kind, context, value, path)}"


def _expected(kind: str, context: dict[str, Any], value: Any, path: tuple[str | int, ...]) -> str:
    if kind == "value_error":
        return str(context["error"])[:300]
    got = f", got {_show(value)}"
    if kind in _BOUNDS:
        bound, relation = _BOUNDS[kind]
        return f"must be {relation} {_number(context[bound])}{got}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}{got}"
    if kind == "too_short":
        return "must have at least one entry" if context["min_length"] == 1 else "must be two numbers, [from, to]"
    if kind == "too_long":
        return "must be two numbers, [from, to]"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters{got}"
    if kind == "string_pattern_mismatch" and "[A-Za-z" not in context["pattern"]:
        return f"must be two whole numbers as 4096-4351{got}"
    if kind == "string_pattern_mismatch":
        return f"must be letters, digits, '.', '_' and '-' only{got}"
    what = wanted(path)
    if kind in ("model_type", "list_type", "tuple_type") or names(what):
        return f"must be {_shape(what, kind)}{got}"
    words = {
        "finite_number": "a finite number",
        "int_type": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
    }
    return f"must be {words[kind]}{got}" if kind in words else f"cannot be {_show(value)}"


def _advice(kind: str, context: dict[str, Any], value: Any, path: tuple[str | int, ...]) -> str:
    if kind == "literal_error" and isinstance(value, str):
        near = nearest(value, context["expected"].replace(" or ", ", ").replace("'", "").split(", "))
        return f"; did you mean {near!r}?" if near else ""
    if kind == "model_type" and value is None:
        required = any(Recipe.model_fields[str(step)].is_required() for step in path[:1])
        return "; indent its keys below it" if required else "; remove the line to have the defaults"
    if kind == "string_type" and value is not None and not isinstance(value, (dict, list)):
        return "; put it in quotes"
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        fits = type(scalar(value)) in ((int,) if kind == "int_type" else (int, float))
        return "; remove the quotes" if fits else ""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    return ""


def _shape(what: Any, kind: str) -> str:
    if what == list[Segment]:
        return "a number or a list of pieces"
    if kind == "tuple_type":
        return "two numbers, [from, to]"
    if kind == "list_type":
        return "a list"
    return f"a section with keys of its own ({', '.join(names(what)[:4])}, ...)"


def _needs(what: Any) -> str:
    if names(what):
        return f"add the section with its keys ({', '.join(names(what)[:4])}, ...)"
    if what == list[Segment]:
        return "set a number or a list of pieces"
    if what is int:
        return "set an integer"
    return {float: "set a number", bool: "set true or false", str: "set a text"}.get(
        what, f"set a list of {get_args(what)[0].__name__.lower()}" if get_args(what) else "set it"
    )


def _number(bound: float) -> str:
    """As someone would write it: 1024, 1e+15, 0.1."""
    return str(bound) if isinstance(bound, int) and bound < 10**9 else f"{bound:g}"


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    if isinstance(value, (dict, list, tuple)):
        return "a section" if isinstance(value, dict) else "a list"
    return str(value)[:60]
