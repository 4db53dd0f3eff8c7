"""YAML -> a typed, checked `Recipe`, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from dsv3_train.recipe import checks, compose
from dsv3_train.recipe.faults import Fault, Place, refuse
from dsv3_train.recipe.messages import faults_of
from dsv3_train.recipe.overrides import apply, prefer_text
from dsv3_train.recipe.schema import Recipe, Schedule
from dsv3_train.recipe.yaml_source import FLOAT, INT, Node


def load(ref: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `ref`, a shipped recipe's name or a file's path, with `a.b=c` overrides on top.

    Raises:
        UserError: one line per fault, all that could be found at once: `FILE:LINE: key: what is wrong; the fix`.
    """
    faults: list[Fault] = []
    return _checked(compose.read(ref, faults), overrides, faults)


def build(plain: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of plain values, which `source` (a file's name) gave, with `a.b=c` overrides on top.

    Raises:
        UserError: as `load`, at `source`.
    """
    return _checked(_nodes(plain, Place(source)), overrides, [])


def _nodes(plain: Any, place: Place) -> Node:
    if isinstance(plain, dict):
        return Node({key: _nodes(value, place) for key, value in plain.items()}, place)
    if isinstance(plain, list):
        return Node([_nodes(value, place) for value in plain], place)
    return Node(plain, place)


def _checked(root: Node, overrides: Sequence[str], faults: list[Fault]) -> Recipe:
    for override in overrides:
        apply(root, override, faults)
    prefer_text(root)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        refuse([*faults, *faults_of(error, root)])
    if not faults:
        for key, message in checks.check(recipe):
            path = tuple(int(step) if step.isdigit() else step for step in key.split("."))
            faults.append(Fault(root.nearest(path)[0].place, key, message))
    if faults:
        refuse(faults)
    recipe._private = root.any_private()
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, no base, no variables; `load` reads an equal recipe from it."""
    return yaml.dump(values(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def values(recipe: Recipe) -> dict[str, Any]:
    """Plain values as they stand in YAML: steps as `N steps`, schedules without the keys that a piece lacks."""
    plain = recipe.model_dump(mode="json")
    for name, pieces in plain["schedule"].items():
        if isinstance(pieces, list):
            short = [{key: _whole(value) for key, value in piece.items() if value is not None} for piece in pieces]
            plain["schedule"][name] = short[0]["constant"] if list(short[0]) == ["constant"] else short
    return plain


def settings(recipe: Recipe) -> dict[str, Any]:
    """Its plain values by key, as `training.seed`; lists and schedules count as one setting."""
    return dict(_flat(values(recipe)))


def diff(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every one of the `settings` that differs."""
    left, right = settings(a), settings(b)
    keys = [*left, *(key for key in right if key not in left)]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe's file, for editors.

    A file with a `base` may lack any key, so only the top level asks for some.
    """
    described = Recipe.model_json_schema()
    number_or = [{"type": "number"}]
    for name, field in Schedule.model_fields.items():
        if field.annotation is not float:
            pieces = described["$defs"]["Schedule"]["properties"][name]
            array = {key: pieces.pop(key) for key in ("type", "items", "minItems") if key in pieces}
            pieces["anyOf"] = [*number_or, array]
    for section in described["$defs"].values():
        section.pop("required", None)
    base = {"type": "string", "description": "Another recipe to build on: its name, or its path from this file."}
    described["properties"] = {"base": base, **described["properties"]}
    described["anyOf"] = [{"required": ["base"]}, {"required": described.pop("required")}]
    described["anyOf"][1]["required"].remove("name")
    return described


def _whole(value: Any) -> Any:
    """Numbers of a schedule as people write them: 8 rather than 8.0."""
    if isinstance(value, list):
        return [_whole(number) for number in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would take for a number, and shields `${`."""


# On top of YAML 1.1's, so that other readers see the same text too.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"(?:{INT.pattern})\Z"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{FLOAT.pattern})\Z"), list("-+.0123456789"))
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_str(text.replace("${", "$${")))
