"""The keys that a recipe can have, from the schema: what stands where, and what a wrong key may have meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from dsv3_train.recipe.schema import Recipe
from dsv3_train.recipe.section import Section


def wanted(path: Iterable[str | int]) -> Any:
    """The type of the setting at `path`: a Section, `list[...]`, `str`, ...; None if there is no such key."""
    kind: Any = Recipe
    for step in path:
        if isinstance(kind, type) and issubclass(kind, Section) and step in kind.model_fields:
            kind = _bare(kind.model_fields[str(step)].annotation)
        elif get_origin(kind) is list and isinstance(step, int):
            kind = _bare(get_args(kind)[0])
        else:
            return None
    return kind


def names(kind: Any) -> list[str]:
    """Keys of a section; none of any other type."""
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Section) else []


def meant(path: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...] | None]:
    """For an unknown key: advice, and the key of the same section that was probably meant."""
    *parents, name = path
    here = names(wanted(parents))
    near = nearest(str(name), here)
    if near and near.lower() == str(name).lower():
        return f"unknown key; did you mean {near!r}?", (*parents, near)
    elsewhere = [key for key in _all_keys() if key.split(".")[-1] == name]
    if elsewhere:
        return f"unknown key here; it belongs at {' or '.join(elsewhere)}", None
    if near:
        return f"unknown key; did you mean {near!r}?", (*parents, near)
    return f"unknown key; valid here: {', '.join(here)}", None


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The most similar word, if any is similar; case does not count."""
    by_lower = {known.lower(): known for known in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _all_keys(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    for name in names(kind):
        yield prefix + name
        yield from _all_keys(_bare(kind.model_fields[name].annotation), f"{prefix}{name}.")


def _bare(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _bare(options[0]) if len(options) == 1 else annotation
    return annotation
