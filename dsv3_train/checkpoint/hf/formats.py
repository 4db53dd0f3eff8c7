"""Formats of quantised weights that are not read, named as such before a tensor is missed for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_train import regular
from dsv3_train.checkpoint.hf.files import PACKED, Stored
from dsv3_train.checkpoint.hf.names import SCALE
from dsv3_train.errors import UserError

_FILE = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says what `config.json` does not."""
_LARGEST = 1 << 22
_READ = "this reads BF16, FP32, and FP8 (E4M3) with FP32 scales of 128x128 blocks; take files in one of these"
_PACKED = {
    "pack-quantized": "INT4 (compressed-tensors, pack-quantized)",
    "nvfp4-pack-quantized": "NVFP4 (compressed-tensors)",
    "mxfp4-pack-quantized": "MXFP4 (compressed-tensors)",
}
"""Formats of compressed-tensors whose name is not what people call them."""
_ENDINGS = {
    ".weight_packed": "INT4 or FP4 in packs (compressed-tensors)",
    ".weight_scale_2": "NVFP4 (ModelOpt)",
    ".qweight": "INT4 (GPTQ or AWQ)",
    "_blocks": "MXFP4",
    ".weight_scale": "FP8 or INT8 with other scales than those of 128x128 blocks",
}
"""By how a tensor's name ends; the first that fits."""


def refuse_named(path: Path, *configs: dict[str, Any]) -> None:
    """Refuse what config.json or ModelOpt's file says is stored in a format that is not read.

    Args:
        configs: config.json, and the part of it that is the language model's.

    Raises:
        UserError: names the format, the file and the key.
    """
    file = path / _FILE
    if os.path.lexists(file):
        try:
            kind = json.loads(regular.read(file, _LARGEST).decode())["quantization"]["quant_algo"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: not ModelOpt's description of a quantisation ({error}); fetch it again") from None
        if kind:
            raise UserError(f"{file}: quantization.quant_algo: stored in {kind} (ModelOpt), which is not read; {_READ}")
    for config in configs:
        said = config.get("quantization_config")
        if isinstance(said, dict) and (kind := _named(said)):
            raise UserError(
                f"{path / 'config.json'}: quantization_config: stored in {kind}, which is not read; {_READ}"
            )


def _named(said: dict[str, Any]) -> str | None:
    """The format of a `quantization_config`; None: FP8 in blocks, whose details are checked elsewhere."""
    method = said.get("quant_method")
    if method == "compressed-tensors":
        kind = str(said.get("format") or "compressed-tensors")
        return _PACKED.get(kind, f"{kind} (compressed-tensors)")
    if method == "fp8":
        return None if said.get("weight_block_size") else "FP8 without weight_block_size (a scale per tensor or row)"
    if said.get("quant_algo"):
        return f"{said['quant_algo']} ({method or 'ModelOpt'})"
    if not method:
        return None
    bits = f" ({said['bits']} bits)" if "bits" in said else ""
    return f"{'MXFP4' if method == 'mxfp4' else method}{bits}"


def refuse_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Refuse tensors whose names and types are those of a format that is not read.

    Raises:
        UserError: names the format, and the first such tensor.
    """
    found = [(ending, name) for ending in _ENDINGS for name in sorted(tensors) if name.endswith(ending)]
    kinds = {name: _ENDINGS[ending] for ending, name in reversed(found)}
    for name, stored in tensors.items():
        if name.endswith(SCALE) and stored.dtype in ("F8_E8M0", "U8"):
            kinds[name] = "FP8 with E8M0 scales"
        elif stored.dtype in (*PACKED, "F8_E8M0") and name not in kinds:
            kinds[name] = f"{stored.dtype.removeprefix('F8_')} (microscaling)"
    for name, kind in reversed(kinds.items()):
        stored = tensors[name]
        raise UserError(f"{stored.file}: {name} is {stored.dtype}, stored in {kind}, which is not read; {_READ}")
