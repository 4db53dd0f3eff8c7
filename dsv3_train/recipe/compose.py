"""From a recipe's name or path to one tree: the file, on top of what it names as `base:`."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from dsv3_train.recipe.faults import Fault, Place, refuse
from dsv3_train.recipe.yaml_source import Node, parse

_LARGEST = 1024 * 1024  # bytes; anything beyond is no recipe, and is not read
_DEEPEST = 20  # recipes on top of each other


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("dsv3_recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(ref: str, faults: list[Fault]) -> Node:
    """The recipe `ref`, a shipped recipe's name or a path, merged with its bases; single faults are appended.

    Sections merge key by key; everything else, lists and schedules included, replaces what the base says. The name
    is never inherited: without one, a recipe has its file's.

    Raises:
        UserError: no such recipe, or a file that cannot be read as one.
    """
    return _read(_find(ref, Path(), Place(ref or "''"), "", faults), (), faults)


def _find(ref: str, folder: Path, place: Place, key: str, faults: list[Fault]) -> Path:
    known = shipped()
    is_path = "/" in ref or ref.endswith((".yaml", ".yml"))
    if not is_path and ref in known:
        return known[ref]
    try:
        found = (folder / ref).exists()
    except (OSError, ValueError):  # no possible file name
        found = False
    if ref and found:
        return folder / ref
    near = difflib.get_close_matches(ref.rsplit("/", 1)[-1].removesuffix(".yaml"), known, n=1)
    what = "no such file" if is_path else "no shipped recipe of that name, and no such file"
    advice = f"did you mean the shipped recipe {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    _stop(faults, place, key, f"{str(folder / ref)!r}: {what}; {advice}" if key else f"{what}; {advice}")


def _stop(faults: list[Fault], place: Place, key: str, message: str) -> NoReturn:
    refuse([*faults, Fault(place, key, message)])


def _read(path: Path, above: tuple[Path, ...], faults: list[Fault]) -> Node:
    place = Place(str(path))
    root = parse(_text(path, faults), place, faults)
    if root.value is None:
        _stop(faults, place, "", "empty; a recipe has the sections model, schedule and training, or a base")
    if not isinstance(root.value, dict):
        kind = "list" if isinstance(root.value, list) else "single value"
        _stop(faults, place, "", f"a recipe is a mapping of sections (model:, schedule:, ...), not a {kind}")
    root.place, root.private = place, not path.stat().st_mode & 0o044
    root.value.setdefault("name", Node(path.stem, place))
    base = root.value.pop("base", None)
    if base is None:
        return root
    if not isinstance(base.value, str):
        _stop(faults, base.place, "base", "must be the name or the path of another recipe")
    found = _find(base.value, path.parent, base.place, "base", faults)
    chain = (*above, path.resolve())
    if len(chain) > _DEEPEST:
        _stop(faults, base.place, "base", f"more than {_DEEPEST} recipes that build on each other; merge some of them")
    if found.resolve() in chain:
        names = " -> ".join(step.name for step in (*chain, found.resolve()))
        _stop(faults, base.place, "base", f"recipes build on each other in a circle: {names}; remove one base")
    return _merge(_read(found, chain, faults), root)


def _merge(base: Node, top: Node) -> Node:
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for name, node in top.value.items():
        merged[name] = _merge(merged[name], node) if name in merged else node
    return Node(merged, top.place, private=base.private or top.private)


def _text(path: Path, faults: list[Fault]) -> str:
    place = Place(str(path))
    if path.is_dir():
        _stop(faults, place, "", "a directory; name a recipe's file in it")
    if not path.is_file():
        _stop(faults, place, "", "not a file")
    if path.stat().st_size > _LARGEST:
        _stop(faults, place, "", f"{path.stat().st_size} bytes are too many for a recipe")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        _stop(faults, place, "", f"not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        _stop(faults, place, "", f"cannot be read: {error.strerror}")
