"""Recipe text -> a tree of values that know where they were written. Nothing in the text can run code.

Plain scalars follow YAML 1.2: `1e-4` is a number; `on`, `off`, `yes`, `no` and dates are text. Tags, aliases and
duplicate keys are refused. `${env:NAME}` and `${env:NAME:default}` are replaced in values; `$${` stays `${`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import yaml

from dsv3_train.recipe.faults import Fault, Place, dotted, refuse

INT = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: value for value, name in ((True, "true"), (False, "false")) for word in (name, name.title(), name.upper())
}
_ENV = re.compile(r"\$\$\{|\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}|\$\{[^}]*\}?")
_STANDARD_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}
_LONGEST = 100_000  # characters; recipes are a tenth of that, and parsing takes seconds beyond it
_DEEPEST = 20  # levels


@dataclass
class Node:
    """A value of a recipe, and where it stands."""

    value: Any
    """A dict or list of nodes, or a scalar."""
    place: Place
    text: str | None = None
    """As written, where a key that wants text may have it instead of `value`: overrides, variables."""
    private: bool = False
    """The environment gave it, or a file that others may not read."""

    def plain(self) -> Any:
        """The values alone."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def any_private(self) -> bool:
        """Whether it or a value in it is."""
        inner = self.value.values() if isinstance(self.value, dict) else self.value
        inside = inner if isinstance(self.value, (dict, list)) else []
        return self.private or any(node.any_private() for node in inside)

    def nearest(self, path: tuple[str | int, ...]) -> tuple[Node, int]:
        """The node at `path`, or the closest one above it, and how much of the path leads there."""
        node = self
        for depth, step in enumerate(path):
            inside = isinstance(node.value, dict) and step in node.value
            if not inside and not (isinstance(node.value, list) and isinstance(step, int) and step < len(node.value)):
                return node, depth
            node = node.value[step]
        return node, len(path)


class _Loader(yaml.SafeLoader):
    """Composes nodes only: no scalar is resolved, no alias followed, nothing constructed."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not allowed; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            problem = f"more than {_DEEPEST} levels inside each other"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


def parse(text: str, place: Place, faults: list[Fault], *, key: str = "") -> Node:
    """The tree of a recipe's text; what is wrong with single values is appended to `faults`.

    Args:
        place: the source; lines are counted within it unless the value stands at `key` of an override.

    Raises:
        UserError: the text is not YAML.
    """
    if len(text) > _LONGEST:
        refuse([*faults, Fault(place, key, f"{len(text)} characters are too many for a recipe")])
    try:
        root = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        refuse([*faults, _syntax_fault(error, text, place, key)])
    if root is None:
        return Node(None, place, text="")
    return _Reader(place, key, faults).node(root, tuple(key.split(".")) if key else ())


def scalar(text: str) -> Any:
    """A plain scalar's value: null, boolean, integer, finite number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        if INT.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
            return number
    except ValueError:  # more digits than Python converts
        pass
    return text


class _Reader:
    """YAML nodes -> `Node`s."""

    def __init__(self, place: Place, key: str, faults: list[Fault]) -> None:
        self._place, self._is_override, self._faults = place, bool(key), faults

    def node(self, node: yaml.Node, path: tuple[str | int, ...]) -> Node:
        place = self._place if self._is_override else Place(self._place.source, node.start_mark.line + 1)
        if node.tag not in _STANDARD_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._faults.append(Fault(place, dotted(path), f"the tag {tag} is not allowed; write the plain value"))
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path), place)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.node(item, (*path, index)) for index, item in enumerate(node.value)], place)
        return self._scalar(node, path, place)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            place = self._place if self._is_override else Place(self._place.source, line)
            if not isinstance(key_node, yaml.ScalarNode):
                self._faults.append(Fault(place, dotted(path), "a key must be a word, not a list or mapping"))
                continue
            name = key_node.value
            value = self.node(value_node, (*path, name))
            value.place = place  # a setting stands where its key does
            if name in values:
                where = "" if self._is_override else f" (first on line {values[name].place.line})"
                self._faults.append(Fault(place, dotted((*path, name)), f"given twice{where}; keep one"))
                continue
            values[name] = value
        return values

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...], place: Place) -> Node:
        problems: list[str] = []
        text = _ENV.sub(lambda match: _expand(match, problems), node.value)
        self._faults.extend(Fault(place, dotted(path), problem) for problem in problems)
        private = any(found[1] and found[1] in os.environ for found in _ENV.finditer(node.value))
        if node.style is not None:  # quoted
            return Node(text, place, private=private)
        written = text if self._is_override or text != node.value else None
        return Node(scalar(text), place, text=written, private=private)


def _expand(match: re.Match[str], problems: list[str]) -> str:
    whole, name, default = match[0], match[1], match[2]
    if whole == "$${":
        return "${"
    if name is None:
        problems.append(f"{whole} is neither ${{env:NAME}} nor ${{env:NAME:default}}; write $${{ for a plain ${{")
    elif name in os.environ or default is not None:
        return os.environ.get(name, default or "")
    else:
        problems.append(f"the environment variable {name} is not set; export it, or write ${{env:{name}:default}}")
    return whole


def _syntax_fault(error: yaml.YAMLError, text: str, place: Place, key: str) -> Fault:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    if problem.startswith("but ") and getattr(error, "context", None):
        problem = f"{error.context}, {problem}"  # type: ignore[attr-defined]
    position = getattr(error, "position", None)
    line = mark.line + 1 if mark else text.count("\n", 0, position) + 1 if isinstance(position, int) else None
    written = text.splitlines()[line - 1] if line and line <= len(text.splitlines()) else ""
    hint = ""
    if "\t" in written:
        hint = "; indent with spaces, not tabs"
    elif "${" in written:
        hint = "; inside [..] or {..}, put values with ${..} in quotes"
    elif "mapping values are not allowed" in problem:
        hint = "; put text with ': ' in quotes, and give keys of one section the same indent"
    return Fault(place if key else Place(place.source, line), key, f"not valid YAML: {problem}{hint}")
