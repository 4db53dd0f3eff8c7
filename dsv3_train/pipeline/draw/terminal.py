"""The picture in coloured cells of a terminal; in letters where there are no colours."""

from __future__ import annotations

from bisect import bisect_right

from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

from dsv3_train.pipeline.draw.panel import COLOURS, NAMES, Panel, chunk, chunk_names, colour, hex_colour, ink
from dsv3_train.pipeline.operations import Op
from dsv3_train.pipeline.simulate import Span, in_flight

_RIGHT = 12
"""Columns of a rank's bubble and peak in flight."""


def terminal(panel: Panel, console: Console) -> Group:
    """One line per rank, within the console's width."""
    held, bubbles = in_flight(panel.schedule), panel.run.bubbles
    left = max(2, len(str(panel.schedule.ranks - 1)))
    columns = _columns(panel, console.width - left - 1 - _RIGHT)
    plain = console.color_system is None or console.no_color
    lines = [
        Text(panel.title, style="bold"),
        Text(panel.summary),
        Text(f"{'':{left + 1 + columns}}{'bubble':>7}{'held':>5}", style="dim"),
    ]
    for rank in range(panel.schedule.ranks):
        cells = _letters(panel, rank, columns) if plain else _colours(panel, rank, columns)
        lines.append(Text.assemble(f"{rank:>{left}} ", cells, f"{bubbles[rank]:>7.1%}{held[rank]:>5.3g}"))
    return Group(*lines, *_legend(panel, plain))


def _columns(panel: Panel, room: int) -> int:
    """Columns of the whole span: a whole number of them per shortest computation where they fit, else all there are."""
    shortest = min(span.end - span.start for spans in panel.run.timeline for span in spans)
    units = panel.run.span / shortest if shortest > 0 else room
    per_unit = min(3, int(room / units))
    return max(1, min(room, round(units * per_unit) if per_unit else room))


def _at(panel: Panel, rank: int, columns: int) -> list[Span | None]:
    """What runs in the middle of each column."""
    spans = panel.run.timeline[rank]
    starts = [span.start for span in spans]
    origin = min(spans[0].start for spans in panel.run.timeline)
    running: list[Span | None] = []
    for column in range(columns):
        moment = origin + (column + 0.5) * panel.run.span / columns
        number = bisect_right(starts, moment) - 1
        running.append(spans[number] if number >= 0 and moment < spans[number].end else None)
    return running


def _colours(panel: Panel, rank: int, columns: int) -> Text:
    ranks, text, column = panel.schedule.ranks, Text(), 0
    running = _at(panel, rank, columns)
    while column < columns:
        span = running[column]
        width = next((k for k in range(1, columns - column) if running[column + k] is not span), columns - column)
        if span is None:
            text.append(" " * width)
        elif len(span.ops) == 1:
            text.append_text(_cell(span.ops[0], ranks, width))
        else:  # forward above, backward below; their numbers at the ends where there is room
            forward, backward = span.ops
            ends = width // 3
            halves = Style(color=hex_colour(colour(forward, ranks)), bgcolor=hex_colour(colour(backward, ranks)))
            text.append_text(_cell(forward, ranks, ends))
            text.append("▀" * (width - 2 * ends), halves)
            text.append_text(_cell(backward, ranks, ends))
        column += width
    return text


def _cell(op: Op, ranks: int, width: int) -> Text:
    """The end of the micro-batch's number that fits, on the operation's colour."""
    rgb = colour(op, ranks)
    shown = str(op.micro_batch)[-width:].ljust(width) if width else ""
    return Text(shown, Style(color=ink(rgb), bgcolor=hex_colour(rgb)))


def _letters(panel: Panel, rank: int, columns: int) -> Text:
    def letter(span: Span | None) -> str:
        if span is None:
            return "·"
        op = span.ops[0]
        kind = "X" if len(span.ops) == 2 else op.kind
        return kind.lower() if chunk(op, panel.schedule.ranks) else kind

    return Text("".join(map(letter, _at(panel, rank, columns))))


def _legend(panel: Panel, plain: bool) -> list[Text]:
    kinds = {op.kind for spans in panel.run.timeline for span in spans for op in span.ops}
    pairs = any(len(span.ops) == 2 for spans in panel.run.timeline for span in spans)
    names, ranks, text = chunk_names(panel.schedule), panel.schedule.ranks, Text()
    for kind in (kind for kind in COLOURS if kind in kinds):
        if plain:
            text.append(f"{kind} ")
        for number in range(0 if plain else len(names)):
            rgb = colour(Op(kind, 0, number * ranks, 0), ranks)  # type: ignore[arg-type]
            text.append("  ", Style(bgcolor=hex_colour(rgb)))
        text.append(f" {NAMES[kind]}  " if not plain else f"{NAMES[kind]}  ")
    notes = []
    if len(names) > 1:
        notes.append(f"{'small letters' if plain else 'lighter'}: {names[1] if len(names) == 2 else 'later chunks'}")
    if pairs:
        notes.append("X: F and B overlap, named by its F" if plain else "two colours: F and B overlap")
    if not plain:
        notes.append("numbers: micro-batches' last digits")
    return [text, Text("; ".join(notes), style="dim")] if notes else [text]
