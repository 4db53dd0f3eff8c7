"""`dsv3 generate`: text from a checkpoint."""

from __future__ import annotations

from typing import Annotated, Optional

import typer


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A run directory (its newest checkpoint), or one checkpoint.")],
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(help="Recipe overrides, as parallel={world_size: 8, expert: 8}.", metavar="[a.b=c]..."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    ids: Annotated[
        Optional[str],
        typer.Option(help="Token ids to continue, as 0,17,4; prints ids, and needs no tokenizer."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens of this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a text with a trained model.

    The model runs in one process whatever layout trained it, unless the overrides say otherwise.

    Example: dsv3 generate runs/smoke --prompt "def main(" --temperature 0.7
    """
    from pathlib import Path

    from dsv3_train.checkpoint.directory import resolve
    from dsv3_train.errors import UserError
    from dsv3_train.generation.command import Request, run

    if ids is not None and prompt:
        raise UserError("--ids: cannot be combined with --prompt; give one of the two")
    path = resolve(Path(checkpoint))
    run(path, overrides or [], Request(prompt, _numbers(ids), max_tokens, temperature, top_p, seed, as_json))


def _numbers(ids: str | None) -> list[int] | None:
    from dsv3_train.errors import UserError

    if ids is None:
        return None
    parts = ids.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--ids: {ids!r}: give token ids, as 0,17,4")
    return [int(part) for part in parts]
