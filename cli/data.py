"""`dsv3 data`: make indexed datasets and look into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsv3_cli.progress import progress

if TYPE_CHECKING:
    from dsv3_train.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Make indexed datasets from text, and look into them.")

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Text files (one document each), JSONL (one per line) or Parquet (one per row), also compressed (.gz, "
            ".zst, .bz2, .xz); the content decides which. Directories, globs, python-stdlib and python-packages too.",
            metavar="INPUT...",
        ),
    ],
    output: Annotated[str, typer.Option(help="Prefix of the files to write.", metavar="PREFIX")],
    tokenizer: Annotated[
        Optional[str], typer.Option(help="A tokenizer.json, or the directory that holds it; without it, train one.")
    ] = None,
    eos_token: Annotated[
        Optional[str],
        typer.Option(help="The token of --tokenizer that ends a document (default: as its configuration says)."),
    ] = None,
    vocab_size: Annotated[Optional[int], typer.Option(help="Tokens of a trained tokenizer (default: 4096).")] = None,
    fim_rate: Annotated[
        float, typer.Option(help="Share of documents rearranged for fill-in-the-middle; 0.1 in the report.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the choice of those documents.")] = 1234,
    max_bad: Annotated[
        float, typer.Option(help="Share of documents that may be unreadable (0 to 1); with more, nothing is written.")
    ] = 0.01,
    text_key: Annotated[
        str, typer.Option(help="The key of a JSON line, or the column of Parquet, that holds the text.")
    ] = "text",
    workers: Annotated[
        Optional[int], typer.Option(min=1, help="Processes (default: one per core); the result is the same for any.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Tokenise text into PREFIX.bin, .idx, .tokenizer.json, .tokenizer_config.json and .manifest.json.

    A run that was killed goes on where it stopped; what is there already is not made again.

    Example: dsv3 data prepare python-stdlib --vocab-size 4096 --fim-rate 0.1 --output data/stdlib
    """
    from dsv3_train.data.prepare import prepare as run
    from dsv3_train.errors import UserError
    from dsv3_train.recipe.schema import Prepare

    if tokenizer and vocab_size:
        raise UserError("--vocab-size: the tokenizer of --tokenizer has its own; give one of the two")
    if eos_token and not tokenizer:
        raise UserError("--eos-token: names a token of --tokenizer, which is missing; a trained tokenizer has its own")
    if not 0 <= fim_rate <= 1:
        raise UserError(f"--fim-rate: {fim_rate:g} is no share of documents; give 0 to 1")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad: {max_bad:g} is not a share of documents; give a number from 0 to 1")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"--vocab-size: {vocab_size} is no number of tokens; give 260 or more")
    trained = {} if vocab_size is None else {"vocab_size": vocab_size}
    settings = Prepare(
        inputs=inputs,
        output=output,
        tokenizer=tokenizer,
        eos_token=eos_token,
        fim_rate=fim_rate,
        seed=seed,
        max_bad=max_bad,
        **trained,
    )
    with progress() as report:
        manifest = run(settings, report, text_key=text_key, workers=workers, compare=True)
    print(manifest.model_dump_json(indent=1) if as_json else _summary(output, manifest))


@app.command()
def index(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (dsv3 recipes list) or a YAML file.")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Recipe overrides, as the run will have.", metavar="[a.b=c]...")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Prepare a run's data and build its order of samples, before it begins.

    The run would do so itself, in one process, while all its GPUs wait. Needs no GPU; the same recipe and overrides.

    Example: dsv3 data index smoke runtime.run_dir=runs/try
    """
    import contextlib
    import dataclasses
    import json
    import sys

    from dsv3_train.recipe.load import load
    from dsv3_train.training.indices import build

    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints when it builds an index
        found = build(load(recipe, overrides or []))
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    how = f"built in {found.seconds:.1f} s" if found.seconds else "there already"
    print(f"{found.cache}: {found.samples:,} samples, {found.gibibytes:.3g} GiB, {how}")


@app.command()
def show(
    prefix: Annotated[str, typer.Argument(help="Prefix of a dataset; with --samples, a run directory.")],
    document: Annotated[int, typer.Option(help="The document to print the beginning of, from 0.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of the dataset and compare its hashes with the manifest's.")
    ] = False,
    samples: Annotated[
        Optional[list[str]],
        typer.Option(help="Samples of a run: FIRST-LAST, a number, or skipped.", metavar="SAMPLES"),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Check a dataset's index and sizes, and show what it holds; or show samples that a run trains on or passes over.

    Example: dsv3 data show data/stdlib --document 3 --verify

    Example: dsv3 data show runs/smoke --samples skipped
    """
    import dataclasses
    import json

    from dsv3_train.errors import printable

    if samples:
        _show_samples(prefix, samples, as_json)
        return
    from dsv3_train.data.show import show as run

    contents = run(prefix, document, verify)
    if as_json:
        manifest = contents.manifest and contents.manifest.model_dump()
        print(json.dumps({**dataclasses.asdict(contents), "manifest": manifest}))
        return
    if contents.manifest:
        print(_summary(prefix, contents.manifest))
    else:
        print(f"{prefix}: {contents.documents:,} documents, {contents.tokens:,} tokens ({contents.dtype}), no manifest")
    shown = contents.document
    print(f"document {shown.number}: {shown.tokens:,} tokens, the first {len(shown.first_ids)}:")
    print(shown.first_ids if shown.text is None else printable(shown.text))


def _show_samples(run_dir: str, asked: list[str], as_json: bool) -> None:
    import contextlib
    import dataclasses
    import json
    import sys
    from pathlib import Path

    from dsv3_train.errors import printable
    from dsv3_train.training.samples import samples

    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints when it builds an index
        found = samples(Path(run_dir), asked)
    if as_json:
        print(json.dumps({"samples": [dataclasses.asdict(sample) for sample in found]}))
        return
    if not found:
        print(f"{run_dir}: no sample is passed over")
    for sample in found:
        why = "" if sample.reason is None else f", passed over ({sample.reason}"
        why += f", step {sample.step})" if sample.step else (")" if why else "")
        print(f"sample {sample.number}: {len(sample.tokens)} tokens{why}")
        print(sample.tokens if sample.text is None else printable(sample.text))


def _summary(prefix: str, manifest: Manifest) -> str:
    from dsv3_train.errors import printable

    counts, tokenizer = manifest.counts, manifest.tokenizer
    lines = [
        f"{prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens ({manifest.dtype})",
        f"  text       {counts.bytes:,} bytes of {counts.files:,} files, {counts.bytes / counts.tokens:.2f} per token",
        f"  tokenizer  {tokenizer.vocab_size:,} tokens, in {prefix}.tokenizer.json",
        f"  entropy    {manifest.unigram_entropy:.4f} nats per token, of single tokens",
        f"  FIM        {counts.fim_documents:,} documents at rate {manifest.settings.fim_rate:g}",
        f"  left out   {counts.empty_documents:,} empty documents, {counts.bad:,} bad lines or files",
    ]
    for bad in manifest.bad[:10]:
        lines.append(f"    {bad.file}{'' if bad.line is None else f':{bad.line}'}: {bad.reason}")
    if counts.bad > 10:
        lines.append(f"    ... the first {len(manifest.bad)} are in {prefix}.manifest.json")
    return printable("\n".join(lines))
