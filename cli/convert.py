"""`dsv3 convert`: checkpoints in and out of Hugging Face's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from dsv3_cli.progress import progress

if TYPE_CHECKING:
    from typing import Any

app = typer.Typer(no_args_is_help=True, help="Convert between Hugging Face's DeepSeek-V3 files and checkpoints.")

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Workers = Annotated[
    Optional[int], typer.Option(min=1, help="Processes, 8 at most (default: one per core where there is enough to do).")
]
_Mtp = Annotated[
    Optional[Literal["keep", "drop"]],
    typer.Option(help="Multi-Token Prediction: `keep` refuses files without it (default: keep what is there)."),
]

_FP32_NOISE = 1e-4  # sums in another order; wrongly placed weights differ by orders of magnitude more


@app.command("from-hf")
def from_hf(
    source: Annotated[str, typer.Argument(help="A directory with config.json and safetensors files.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="The run directory to make.", metavar="DST")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Recipe overrides, as parallel.expert=8.", metavar="[a.b=c]...")
    ] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="A recipe to write beside it; without one, derived from config.json.")
    ] = None,
    mtp: _Mtp = None,
    dtype: Annotated[
        Optional[Literal["bf16", "fp32"]],
        typer.Option(help="Of the checkpoint (default: as the files, FP8 as FP32: through BF16 its scales are lost)."),
    ] = None,
    workers: _Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Account for every tensor, and write nothing.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Make a checkpoint that any layout can load: DST/recipe.yaml and DST/checkpoints/step_00000000.

    Tensors that are not weights of the model (frequencies of RoPE, scales of a KV cache, a vision tower, MTP that
    config.json does not count) are left out and counted; `to-hf` puts them back.

    A conversion that was killed goes on where it stopped. Each worker takes up to 0.64 GiB, whatever the model.
    For `dsv3 train` a checkpoint is not needed: checkpoint.load=hf:SRC begins from the files themselves.

    Example: dsv3 convert from-hf models/DeepSeek-V3 runs/v3 --mtp keep --dry-run
    """
    from pathlib import Path

    from dsv3_train.checkpoint.hf import from_hf as work

    plan = work.make_plan(Path(source), recipe, overrides or [], mtp, dtype, Path(target).name or "converted")
    _notes(plan.notes)
    if dry_run:
        _print(plan.report(), as_json, "Would convert")
        return
    with progress() as report:
        done = work.convert(plan, Path(target), workers, report)
    _notes(done["notes"][len(plan.notes) :])
    _print(done, as_json, "Converted")


@app.command("to-hf")
def to_hf(
    source: Annotated[str, typer.Argument(help="A run directory (its newest checkpoint), or one checkpoint.")],
    target: Annotated[str, typer.Argument(help="The directory to make.", metavar="DST")],
    dtype: Annotated[
        Optional[Literal["bf16", "fp8", "fp32"]],
        typer.Option(help="Of the files (default: as those that it came from, else as it trained)."),
    ] = None,
    mtp: _Mtp = None,
    workers: _Workers = None,
    as_json: _AsJson = False,
) -> None:
    """Write a checkpoint as transformers and inference engines read it: safetensors, index, config.json, tokenizer.

    FP8 stores the linear layers in 128x128 blocks. A block that training did not change keeps its scale. The others get
    a scale by the rule of the files that they came from (`from-hf` prints it), or amax / 448.

    Example: dsv3 convert to-hf runs/v3 models/mine --dtype fp8
    """
    from pathlib import Path

    from dsv3_train.checkpoint.directory import resolve
    from dsv3_train.checkpoint.hf import to_hf as work

    plan = work.make_plan(resolve(Path(source)), dtype, mtp)
    with progress() as report:
        done = work.convert(plan, Path(target), workers, report)
    _notes(plan.notes)
    _print(done, as_json, "Converted")


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="A Hugging Face directory, a run directory or a checkpoint.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    logits: Annotated[
        Optional[bool],
        typer.Option(help="Compare logits too, on the CPU (default: for models of up to 1e8 parameters)."),
    ] = None,
    workers: _Workers = None,
    as_json: _AsJson = False,
) -> None:
    """Compare two sets of weights tensor by tensor, and their logits; exit code 1 where they differ.

    Example: dsv3 convert verify models/DeepSeek-V3 runs/v3 --no-logits
    """
    from pathlib import Path

    from dsv3_train.checkpoint.hf.verify import SMALL, open_weights
    from dsv3_train.checkpoint.hf.verify import verify as compare

    first, second = open_weights(Path(a)), open_weights(Path(b))
    with progress() as report:
        found = compare(first, second, workers, report)
    found["logits"] = None
    whole = first.has_main_model and second.has_main_model
    if logits or (logits is None and whole and first.values <= SMALL):
        from dsv3_train.checkpoint.hf.logits import compare_logits

        found["logits"] = compare_logits(first, second)
    _print(found, as_json, "Compared")
    equal = found["identical"] == found["tensors"] and not found["missing"] and not found["surplus"]
    if not equal or (found["logits"] and found["logits"]["relative_difference"] > _FP32_NOISE):
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A Hugging Face directory, a run directory or a checkpoint.")],
    checksums: Annotated[
        bool, typer.Option(help="Read a checkpoint's files for the checksums that it keeps; without, headers alone.")
    ] = True,
    as_json: _AsJson = False,
) -> None:
    """Count tensors, values, types and bytes; say what is missing, surplus or damaged.

    Of a Hugging Face directory it reads headers only: that has no checksums.

    Example: dsv3 convert inspect models/DeepSeek-V3
    """
    from pathlib import Path

    from dsv3_train.checkpoint.hf.inspect import inspect as look

    found = look(Path(path), checksums)
    _print(found, as_json, "Holds")
    if found["problems"]:
        raise typer.Exit(2)


def _notes(notes: list[str]) -> None:
    from rich.console import Console

    for note in notes:
        Console(stderr=True, soft_wrap=True, highlight=False).print(_one_line(note), markup=False)


def _print(found: dict[str, Any], as_json: bool, what: str) -> None:
    """One JSON object, or a line for each key; long lists by their first names."""
    if as_json:
        import json

        print(json.dumps(found))
        return
    print(what)
    for key, value in found.items():
        if isinstance(value, list):
            shown = "".join(f"\n    {_one_line(item)}" for item in value[:10])
            more = f"\n    ... and {len(value) - 10:,} more" if len(value) > 10 else ""
            print(f"  {key}: {len(value):,}{shown}{more}")
        elif isinstance(value, dict):
            print(f"  {key}: {_one_line(', '.join(f'{name} {count}' for name, count in value.items()))}")
        else:
            print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {_one_line(value)}")


def _one_line(value: Any) -> str:
    """A file's or tensor's name for a terminal, which it can neither command nor pass a line of its own off with."""
    from dsv3_train.errors import printable

    return printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
