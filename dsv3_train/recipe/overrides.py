"""`a.b=c` on the command line: settings that replace what the recipe's file says."""

from __future__ import annotations

from typing import Any, get_origin

from dsv3_train.recipe.faults import Fault, Place, dotted
from dsv3_train.recipe.keys import meant, names, wanted
from dsv3_train.recipe.yaml_source import Node, parse


class _Refused(Exception):
    """Why an override cannot be applied, and the key that stands in its way."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path, self.message = path, message


def apply(root: Node, override: str, faults: list[Fault]) -> None:
    """Set one value in the tree; sections and lists that are not there yet are made. Faults are appended.

    The value is a YAML scalar or `[..]`/`{..}`. It replaces what stands at the key, a whole section too. `0` in a
    key counts entries of a list; the number after the last one appends.

    Raises:
        UserError: the value is not YAML.
    """
    place = Place(f"override '{override if len(override) <= 100 else override[:97] + '...'}'")
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        faults.append(Fault(place, "", "write it as key=value, for example training.seed=1"))
        return
    if key == "base":
        faults.append(Fault(place, key, "a recipe's base stands in its file"))
        return
    value = parse(text, place, faults, key=key)
    try:
        _put(root, key.split("."), value, place)
    except _Refused as refused:
        faults.append(Fault(place, dotted(refused.path), refused.message))


def prefer_text(node: Node, path: tuple[str | int, ...] = ()) -> None:
    """Where the schema wants text, take what was written: `name=2024` is text, though YAML reads a number."""
    if isinstance(node.value, dict):
        for name, child in node.value.items():
            prefer_text(child, (*path, name))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            prefer_text(child, (*path, index))
    elif node.text is not None and node.value is not None and wanted(path) is str:
        node.value = node.text


def _put(root: Node, steps: list[str], value: Node, place: Place) -> None:
    node = root
    path: tuple[str | int, ...] = ()
    for step in steps[:-1]:
        index = _index(node, step, path)
        path = (*path, index)
        child = node.value[index] if _holds(node, index) else Node(None, place)
        if child.value is None:
            child = Node(_empty(path), place)
        _set(node, index, child)
        node = child
    _set(node, _index(node, steps[-1], path), value)


def _index(node: Node, step: str, path: tuple[str | int, ...]) -> str | int:
    """The step as a key of the mapping or a number of the list that `node` is."""
    if isinstance(node.value, dict):
        return step
    if not isinstance(node.value, list):
        raise _Refused(path, f"a single value, without a {step!r} in it; set {dotted(path)} as a whole")
    entries = len(node.value)
    if not (step.isascii() and step.isdigit()) or int(step[:9]) > entries:
        valid = f"0 to {entries - 1} for one of its entries, {entries} to append" if entries else "0 to add an entry"
        raise _Refused((*path, step), f"{dotted(path)} is a list of {entries} entries; write {valid}")
    return int(step[:9])


def _holds(node: Node, index: str | int) -> bool:
    return index in node.value if isinstance(node.value, dict) else int(index) < len(node.value)


def _set(node: Node, index: str | int, child: Node) -> None:
    if isinstance(node.value, list) and index == len(node.value):
        node.value.append(child)
    else:
        node.value[index] = child


def _empty(path: tuple[str | int, ...]) -> Any:
    """What the schema has at `path`, with nothing in it yet."""
    kind = wanted(path)
    if names(kind):
        return {}
    if get_origin(kind) is list:
        return []
    raise _Refused(path, "a single value; it has no keys" if kind is not None else meant(path)[0])
