"""A checkpoint's small state, `common.pt`, and its format, `metadata.json`: read in bounds, and checked by type."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_train import regular
from dsv3_train.errors import UserError

NAME, FORMAT = "common.pt", "metadata.json"
_LARGEST = 16 << 20
_MOST = 1 << 62


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Position(_Checked):
    model_config = ConfigDict(extra="forbid")
    step: int = Field(ge=0, le=_MOST)
    consumed_samples: int = Field(ge=0, le=_MOST)
    consumed_tokens: int = Field(ge=0, le=_MOST)


class _Guarded(_Checked):
    model_config = ConfigDict(extra="forbid")
    losses: list[float] = []
    skipped: list[list[int]] = []


class _Common(_Checked):
    position: _Position
    guarded: _Guarded = _Guarded()
    topology: dict[str, Union[int, bool]]
    tokenizer: Optional[str] = None
    data: dict[str, dict[str, Any]] = {}


class _Format(_Checked):
    model_config = ConfigDict(extra="forbid")
    sharded_backend: str = Field(pattern="^torch_dist$")
    sharded_backend_version: int = 1
    common_backend: str = Field(default="torch", pattern="^torch$")
    common_backend_version: int = 1


def read(path: Path) -> dict[str, Any]:
    """The small state of the checkpoint at `path`: position, what the guard knew, layout, settings of optimizers.

    Raises:
        UserError: it cannot be read, or has other types than a run writes; names the file and the key.
    """
    import torch

    _check(_Format, _json(path / FORMAT), path / FORMAT)
    file = path / NAME
    try:
        content = regular.read(file, _LARGEST)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if packed or sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise ValueError("it is compressed, which no checkpoint is")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises what its readers do
        raise UserError(f"{file}: cannot be read ({_words(error)}); take another checkpoint") from None
    _check(_Common, found, file)
    return found


def refuse_unlike(path: Path, saved: Any, own: Any, key: str = "optimizer") -> None:
    """Refuse settings of optimizers that are not built as a run's own.

    What only one of the two has is left to Megatron-core: layouts and versions of it differ there.

    Args:
        saved, own: as `common.pt` and this run have them, nested in dicts and lists.

    Raises:
        UserError: names the key.
    """
    file = path / NAME
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            raise UserError(f"{file}: {key} is no dict; take another checkpoint")
        for name in own.keys() & saved.keys():
            refuse_unlike(path, saved[name], own[name], f"{key}.{name}")
    elif isinstance(own, list):
        if not isinstance(saved, list) or len(saved) != len(own):
            raise UserError(f"{file}: {key} is not a list of {len(own)}; take another checkpoint")
        for number, (one, other) in enumerate(zip(saved, own, strict=True)):
            refuse_unlike(path, one, other, f"{key}.{number}")
    elif isinstance(own, (int, float)) and saved is not None and not _is_number(saved):
        raise UserError(f"{file}: {key} is {saved!r:.50}, and not a number from 0 on; take another checkpoint")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _json(file: Path) -> Any:
    try:
        return json.loads(regular.read(file, _LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({_words(error)}); take another checkpoint") from None


def _check(kind: type[BaseModel], value: Any, file: Path) -> None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UserError(
            f"{file}: {where}: not as a checkpoint has it ({first['msg']}); take another checkpoint"
        ) from None


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"
