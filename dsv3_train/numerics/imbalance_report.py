"""The study of imbalanced tokens in a terminal, as a picture and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from dsv3_train.numerics.page import page
from dsv3_train.numerics.page import table as html_table
from dsv3_train.numerics.picture import styled, svg
from dsv3_train.numerics.table import grid
from dsv3_train.profiling.picture import save
from dsv3_train.profiling.report import as_json
from dsv3_train.whole import write

_TITLE = "Relative error of tokens' input gradients, by how far the tokens are apart in size"
_COLOURS = {"1x128": "#2563eb", "128x1": "#0d9488", "128x128": "#ea580c", "tensor": "#db2777"}
_LINES = {"E4M3": "-", "E4M3 FP32": ":", "E5M2": "--", "E5M6": "-."}


def columns(figures: dict[str, Any]) -> tuple[str, ...]:
    """Of the table: two of words, then numbers."""
    spreads = [errors["decades"] for errors in figures["rows"][0]["errors"]]
    return ("format", "tile", "dY", *map(str, spreads), "lost")


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Per format and tile: error of normal dY, 95th percentile of dX per spread, tokens lost at the widest."""
    return [
        (
            row["format"],
            row["tile"],
            f"{row['errors'][0]['operand']:.4f}",
            *(f"{errors['p95']:.3f}" for errors in row["errors"]),
            f"{row['errors'][-1]['lost']:.0%}",
        )
        for row in figures["rows"]
    ]


def lines(figures: dict[str, Any]) -> list[str]:
    """What the columns of errors mean."""
    shape = figures["shape"]
    return [
        f"{figures['product']}, from BF16: {shape['tokens']} tokens, {shape['outputs']} outputs, {shape['inputs']} "
        "inputs. Token i of dY is N(0, 1) times 10^-u, u uniform in [0, decades].",
        "Under each number of decades (0: normal data): 95th percentile over tokens of |dX' - dX| / |dX|, exact sums. "
        f"lost: tokens whose error is above {figures['lost_above']}, at the widest spread. Scales are "
        "powers of 2, or FP32.",
    ]


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the table."""
    narrow = [(*row[:2], *row[3:]) for row in (columns(figures), *rows(figures))]  # 80 characters, without dY
    console.print(grid(narrow[0], 2, narrow[1:]))
    for line in lines(figures):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def picture(figures: dict[str, Any]) -> Figure:
    """Error over spread, a line per tile and format."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row in figures["rows"]:
            axes.plot(
                [errors["decades"] for errors in row["errors"]],
                [errors["p95"] for errors in row["errors"]],
                _LINES[row["format"]],
                color=_COLOURS[row["tile"]],
                marker="o",
                markersize=3,
                lw=1.3,
                label=f"{row['format']}, {row['tile']}",
            )
        axes.set(
            yscale="log",
            xlabel="decades between the largest and the smallest token",
            ylabel="95th percentile of tokens",
        )
        axes.set_title(_TITLE)
        axes.grid(alpha=0.15)
        axes.legend(ncols=2)

    return styled(draw, 9, 5.5)


def write_study(out: Path, figures: dict[str, Any]) -> list[Path]:
    """Write formats.json, formats.html and formats.png; which they are.

    Raises:
        UserError: one cannot be written.
    """
    paths = [out / f"formats.{kind}" for kind in ("json", "html", "png")]
    drawn = picture(figures)
    body = html_table("By format and tile", columns(figures), 2, rows(figures))
    write(paths[0], as_json(figures) + "\n")
    told = [*lines(figures), "dY: |dY' - dY| / |dY| of normal data."]
    write(paths[1], page("Formats and tiles of FP8", [], svg(drawn), [body], told))
    save(drawn, paths[2])
    return paths
