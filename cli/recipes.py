"""`dsv3 recipes`: what recipes there are, what they say, how they differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, help="List, show and compare recipes, shipped ones or files.")

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_Ref = Annotated[str, typer.Argument(help="A shipped recipe's name, or a file's path.", show_default=False)]


@app.command("list")
def list_recipes(as_json: _Json = False) -> None:
    """The recipes that come with the package.

    Example: dsv3 recipes list
    """
    from dsv3_train.recipe.compose import shipped
    from dsv3_train.recipe.load import load

    recipes = {name: load(name) for name in shipped()}
    if as_json:
        _print_json(
            {
                "recipes": [
                    {
                        "name": name,
                        "description": recipe.description,
                        "world_size": recipe.parallel.world_size,
                        "path": str(shipped()[name]),
                    }
                    for name, recipe in recipes.items()
                ]
            }
        )
        return
    rows = [(name, str(recipe.parallel.world_size), recipe.description) for name, recipe in recipes.items()]
    _print_table(("name", "processes", "what it is"), rows)


@app.command()
def show(
    recipe: _Ref,
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Settings on top, as training.seed=1.", metavar="[a.b=c]...")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Check a recipe and print it resolved: every setting, without bases and variables.

    Example: dsv3 recipes show smoke training.duration="40 steps"
    """
    from dsv3_train.recipe.load import dump, load, values

    loaded = load(recipe, overrides or [])
    if as_json:
        _print_json(values(loaded))
    else:
        print(dump(loaded), end="")


@app.command()
def diff(a: _Ref, b: _Ref, as_json: _Json = False) -> None:
    """The settings in which two recipes differ.

    Example: dsv3 recipes diff smoke smoke_parallel
    """
    from dsv3_train.recipe.load import diff, load

    differences = diff(load(a), load(b))
    if as_json:
        _print_json(
            {"a": a, "b": b, "differences": [{"key": k, "a": left, "b": right} for k, left, right in differences]}
        )
    else:
        _print_table(("key", a, b), [(key, _yaml(left), _yaml(right)) for key, left, right in differences])


@app.command()
def schema() -> None:
    """JSON Schema of a recipe's file, which editors check and complete with.

    Example: dsv3 recipes schema > recipe.schema.json
    """
    from dsv3_train.recipe.load import schema

    _print_json(schema())


def _print_json(report: dict) -> None:
    import json

    print(json.dumps(report, indent=2))


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for title in header:
        table.add_column(Text(title))
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets of a list are no markup
    Console().print(table)


def _yaml(value: object) -> str:
    """One line, as the value would stand in a recipe; settings that a side lacks are null."""
    import json

    return value if isinstance(value, str) else json.dumps(value)
