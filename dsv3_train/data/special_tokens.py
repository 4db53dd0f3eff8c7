"""A tokenizer's files, as transformers names them, and which special tokens they say it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_train import regular
from dsv3_train.errors import UserError

DEFINITION, CONFIGURATION, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_MAP = "special_tokens_map.json"
FILES = (DEFINITION, CONFIGURATION, "chat_template.jinja", _MAP, GENERATION)
"""All that AutoTokenizer and `generate` read beside the weights. Chat templates are data here: never rendered."""

_CLASS = {
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],  # 4.57 adds token_type_ids, which the model refuses
    "tokenizer_class": "PreTrainedTokenizerFast",
}

Files = Mapping[str, bytes]
"""Some of FILES by name."""


def read(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Those of FILES that are in a folder, each under `prefix` + its name.

    Raises:
        UserError: one is no regular file of the folder's own (`regular.contents`).
    """
    paths = {name: folder / f"{prefix}{name}" for name in FILES}
    # A link that leads nowhere is there too, for its reason to be told.
    return {name: regular.contents(path) for name, path in paths.items() if path.exists() or path.is_symlink()}


def beside(definition: Path) -> dict[str, bytes]:
    """FILES of a tokenizer.json: those beside it, under the same prefix (`data/x.tokenizer.json` has `data/x.`).

    A definition under another kind of name stands alone.
    """
    if not definition.name.endswith(DEFINITION):
        return {}
    return read(definition.parent, definition.name.removesuffix(DEFINITION))


def spelling(files: Files, role: str, where: str) -> str | None:
    """What the configuration calls the token of a role: `eos`, `bos` or `pad`; None where it has none.

    Raises:
        UserError: a file is damaged.
    """
    for name in (CONFIGURATION, _MAP):
        token = _object(files, name, where).get(f"{role}_token")
        if isinstance(token, dict):  # transformers' AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return token
        if token is not None:
            raise UserError(f"{where}: {name}: {role}_token must be a string, got {json.dumps(token)}")
    return None


def stops(files: Files, where: str) -> set[int]:
    """Ids that end a text in generation_config.json, one or several: chat models end a turn otherwise than a document.

    And that of the configuration's eos_token, where it lists ids itself (Kimi's, which has no tokenizer.json).

    Raises:
        UserError: a file is damaged.
    """
    listed = _object(files, GENERATION, where).get("eos_token_id")
    found = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int for token in found):
        raise UserError(f"{where}: {GENERATION}: eos_token_id must be an id or a list of ids, got {json.dumps(listed)}")
    eos = spelling(files, "eos", where)
    known = _object(files, CONFIGURATION, where).get("added_tokens_decoder")
    for number, token in known.items() if isinstance(known, dict) else ():
        if isinstance(token, dict) and token.get("content") == eos and number.isdigit():
            found = [*found, int(number)]
    return set(found)


def complete(files: Files, ids: Mapping[str, tuple[str, int]], where: str) -> dict[str, bytes]:
    """The files with what transformers, lm-eval and vLLM need of them beside tokenizer.json.

    Without a configuration transformers 4.57 takes Llama's tokens, 5.24 none.

    Args:
        ids: spelling and id of `bos`, `eos` and `pad`; a configuration with another eos is given this one, what it
            lacks of the others is added, and what it has stays.
    """
    given = _object(files, CONFIGURATION, where)
    settings = {**_CLASS, **given} if "tokenizer_class" not in given else dict(given)
    for role, (token, _) in ids.items():
        if spelling(files, role, where) != token:
            settings[f"{role}_token"] = token
    made: dict[str, Any] = {}
    if settings != given:
        made[CONFIGURATION] = settings
    if _MAP not in files or CONFIGURATION in made:
        made[_MAP] = _object(files, _MAP, where) | {f"{role}_token": token for role, (token, _) in ids.items()}
    if GENERATION not in files:
        made[GENERATION] = {f"{role}_token_id": number for role, (_, number) in ids.items()}
    return {**files, **{name: _text(content) for name, content in made.items()}}


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _object(files: Files, name: str, where: str) -> dict[str, Any]:
    """A file's JSON object; empty where the file is not there."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {name} is damaged ({error}); fetch it again, or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} is damaged (no JSON object); fetch it again, or remove it")
    return found
