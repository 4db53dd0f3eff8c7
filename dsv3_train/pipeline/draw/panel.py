"""What all pictures of a schedule share: what is drawn, colours, labels."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_train.pipeline.formulas import parameter_copies
from dsv3_train.pipeline.operations import Op, Schedule
from dsv3_train.pipeline.simulate import Run, in_flight

COLOURS = {"F": (0x3B, 0x7D, 0xD8), "B": (0x2E, 0x9E, 0x5B), "I": (0x8E, 0x5B, 0xC0), "W": (0xE6, 0x9F, 0x00)}
NAMES = {"F": "forward", "B": "backward", "I": "gradient of inputs", "W": "gradient of weights"}


@dataclass(frozen=True)
class Panel:
    """One timeline of a schedule to draw: simulated, or measured."""

    title: str
    schedule: Schedule
    run: Run
    unit: str = ""
    """Of the timeline, as "ms"; none where the durations are relative."""

    @property
    def summary(self) -> str:
        held, copies = max(in_flight(self.schedule)), parameter_copies(self.schedule.kind)
        return (
            f"bubble {self.run.bubble_fraction:.1%} · time {time(self.run.span, self.unit)} · "
            f"at most {held:.3g} in flight · parameters {copies}x"
        )


def time(value: float, unit: str) -> str:
    return f"{value:.4g}{' ' if unit else ''}{unit}"


def chunk(op: Op, ranks: int) -> int:
    """Which of its rank's chunks an operation is on, as published: dualpipe's direction, a V's leg, a virtual stage."""
    return op.direction or op.stage // ranks


def label(ops: tuple[Op, ...], ranks: int) -> str:
    """`F0.3`: kind, chunk, micro-batch; `F0.3&B1.1` for a pair."""
    return "&".join(f"{op.kind}{chunk(op, ranks)}.{op.micro_batch}" for op in ops)


def colour(op: Op, ranks: int) -> tuple[int, int, int]:
    """Of its kind, the lighter the higher the chunk."""
    light = 1 - 0.5 ** chunk(op, ranks)
    red, green, blue = (round(part + (255 - part) * light) for part in COLOURS[op.kind])
    return red, green, blue


def hex_colour(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def ink(rgb: tuple[int, int, int]) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = rgb
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def chunk_names(schedule: Schedule) -> list[str]:
    """What the shades of a colour mean; one name where there is one shade."""
    if schedule.kind == "dualpipe":
        return ["from rank 0 on", f"from rank {schedule.ranks - 1} on"]
    if schedule.kind in ("zbv", "dualpipev"):
        return ["first leg of the V", "second leg"]
    return [f"chunk {number}" for number in range(schedule.virtual)]
