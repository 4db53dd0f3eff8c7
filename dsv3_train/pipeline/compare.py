"""All schedules side by side for the same ranks, micro-batches and durations."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_train.pipeline.durations import Durations
from dsv3_train.pipeline.formulas import Closed, closed, parameter_copies
from dsv3_train.pipeline.generate import build
from dsv3_train.pipeline.operations import KINDS, Schedule
from dsv3_train.pipeline.simulate import Run, in_flight, simulate


@dataclass(frozen=True)
class Conditions:
    """What the schedules are compared under; the times in the unit of the durations."""

    durations: Durations
    latency: float = 0.0
    blocking: bool = False
    head: float = 0.0
    """Weight of the head, on the last stage, in layers of a rank."""
    virtual: int = 2
    pairs: bool = False
    """F&B pairs in the interleaved schedule."""


@dataclass(frozen=True)
class Compared:
    """One schedule under the conditions."""

    schedule: Schedule
    run: Run
    in_flight: list[float]
    """Per rank, in activations of 1/ranks of the model."""
    in_flight_until_weights: list[float]
    closed: Closed | None
    """None where the formulas do not hold."""

    @property
    def parameter_copies(self) -> int:
        return parameter_copies(self.schedule.kind)


def compare(ranks: int, micro_batches: int, conditions: Conditions) -> tuple[list[Compared], dict[str, str]]:
    """Every schedule that these ranks can run, and of the others why they cannot."""
    compared, notes = [], {}
    for kind in KINDS:
        pairs = conditions.pairs and kind == "interleaved"
        try:
            schedule = build(kind, ranks, micro_batches, conditions.virtual, pairs)
        except ValueError as error:
            notes[kind] = str(error)
            continue
        plain = conditions.durations
        durations = plain.with_head(schedule, conditions.head) if conditions.head else plain
        run = simulate(schedule, durations.of(schedule), conditions.latency, conditions.blocking)
        formula = closed(schedule, plain, pairs)
        valid = formula.holds and not (conditions.latency or conditions.head or conditions.blocking)
        compared.append(
            Compared(schedule, run, in_flight(schedule), in_flight(schedule, True), formula if valid else None)
        )
    return compared, notes
